"""The place of a text depends on its words alone, and places are uniform."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rapidfire_jax.data.splits import fraction


@given(st.text(), st.text())
def test_is_a_pure_fraction(text: str, salt: str) -> None:
    assert 0.0 <= fraction(text, salt[:16]) < 1.0
    assert fraction(text, salt[:16]) == fraction(text, salt[:16])


@given(st.lists(st.from_regex(r"\A[a-z]+\Z"), max_size=8))
def test_case_and_white_space_do_not_count(words: list[str]) -> None:
    assert fraction(" ".join(words)) == fraction("\n " + " \t ".join(words).upper() + "  ")


def test_is_the_same_on_every_machine() -> None:
    assert fraction("A film.") == 0.686920018844918
    assert fraction("A film.", "length") == 0.258792949418883


def test_places_are_uniform_and_salts_independent() -> None:
    plain = np.array([fraction(str(i)) for i in range(4000)])
    salted = np.array([fraction(str(i), "length") for i in range(4000)])
    counts, _ = np.histogram(plain, bins=10, range=(0, 1))
    assert abs(counts - 400).max() < 100  # over 5 standard deviations
    assert abs(np.corrcoef(plain, salted)[0, 1]) < 0.08

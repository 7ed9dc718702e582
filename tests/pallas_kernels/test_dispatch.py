"""Which implementation runs, and what is said where none can."""

import jax
import pytest

from pallas_kernels.dispatch import Choice, Implementation, Operation, prefer, record

OPERATION = Operation(
    "double",
    {
        "fast": Implementation(lambda x: ("fast", 2 * x), lambda x: ["odd number", "too large"][: x % 2 + (x > 9)]),
        "plain": Implementation(lambda x: ("plain", 2 * x)),
    },
)


@pytest.mark.parametrize(("implementation", "x", "ran"), [(None, 2, "fast"), (None, 3, "plain"), ("plain", 2, "plain")])
def test_the_first_that_can_or_the_one_named(implementation, x, ran):
    assert OPERATION(implementation, x) == (ran, 2 * x)


def test_a_name_that_cannot_serve_says_every_reason():
    with pytest.raises(NotImplementedError, match=r"(?s)double: implementation='fast'.*- odd number\n  - too large"):
        OPERATION("fast", 11)


def test_an_unknown_name_is_answered_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"double: implementation='quick'; accepted: 'fast', 'plain', None"):
        OPERATION("quick", 2)


def test_choices_are_recorded():
    with record() as choices:
        OPERATION(None, 2)
        OPERATION(None, 3)
    OPERATION(None, 5)
    assert choices == [Choice("double", "fast", {}), Choice("double", "plain", {"fast": ["odd number"]})]


def test_a_jitted_function_is_traced_again_where_others_are_preferred():
    jitted = jax.jit(lambda x: OPERATION(None, 2)[1] * x)
    for preferred, ran in ((), "fast"), (("plain",), "plain"), (("chunked",), "fast"):
        with record() as choices, prefer(*preferred):
            jitted.trace(1.0)
        assert [choice.implementation for choice in choices] == [ran]
    with record() as choices:
        jitted.trace(1.0)
    assert not choices

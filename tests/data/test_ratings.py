"""Pairs of rated snippets: ordered by rating, none on both sides, from an archive of the same layout."""

import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rapidfire_jax.config.data import DataConfig
from rapidfire_jax.data.examples import load_labelled, load_preferences
from rapidfire_jax.data.ratings import SNIPPETS, movie_pairs, movie_texts
from rapidfire_jax.data.splits import fraction
from rapidfire_jax.errors import InputError

RATINGS = {f"Snippet number {i}, d\xe9j\xe0 vu.": (i % 17 - 8) / 2 for i in range(1500)}


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., str]:
    def make(content: bytes | None = None, name: str = SNIPPETS) -> str:
        lines = [f"{i}\t{rating}\t{text}" for i, (text, rating) in enumerate(RATINGS.items(), start=1)]
        data = "\r\n".join([*lines, lines[0]]).encode("cp1252") if content is None else content
        with tarfile.open(tmp_path / "ratings.tar.gz", "w:gz") as packed:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
        return str(tmp_path / "ratings.tar.gz")

    return make


def test_pairs(archive: Callable[..., str]) -> None:
    path = archive()
    ratings = {text["text"]: text["label"] for text in movie_texts(path=path)}
    assert len(ratings) == 1500
    assert all("d\ufffdj\ufffd vu" in text for text in ratings)  # bytes that are not UTF-8
    every = list(movie_pairs(path=path, min_gap=2.0))
    for pair in every:
        assert pair["margin"] == ratings[pair["chosen"]] - ratings[pair["rejected"]] >= 2.0
        for side in ("chosen", "rejected"):
            assert abs(fraction(pair[side]) - pair["split_place"]) <= 0.005
    assert len({(pair["chosen"], pair["rejected"]) for pair in every}) == len(every)
    by_cell: dict[int, list[float]] = {}
    for text, rating in ratings.items():
        by_cell.setdefault(int(fraction(text) * 100), []).append(rating)
    assert len(every) == sum(a - b >= 2 for cell in by_cell.values() for a in cell for b in cell)
    assert list(movie_pairs(50, path=path, min_gap=2.0)) == every[:50]
    assert list(movie_pairs(50, path=path, min_gap=2.0, seed=1)) != every[:50]
    half = [pair for pair in every if pair["split_place"] < 0.5]
    assert {pair["chosen"] for pair in movie_pairs(path=path, min_gap=2.0, split=[0.0, 0.5])} == {
        p["chosen"] for p in half
    }


@pytest.mark.parametrize("border", [0.5, 0.777])
def test_no_snippet_is_on_both_sides(archive: Callable[..., str], tokenizer: Any, border: float) -> None:
    config = DataConfig(
        function="rapidfire_jax.data.ratings:movie_pairs",
        args={"pairs": 3000, "path": archive(), "min_gap": 0.5},
        train=(0.0, border),
        held_out=(border, 1.0),
    )
    training, held_out = load_preferences(config, tokenizer, seed=0, held_out=400, context=512)
    sides = [
        {text for pair in pairs for text in (pair.chosen_text, pair.rejected_text)} for pairs in (training, held_out)
    ]
    assert all(len(side) > 100 for side in sides)
    assert not sides[0] & sides[1]
    assert all(pair.margin >= 0.5 for pair in training)


def test_texts_are_labelled(archive: Callable[..., str], tokenizer: Any) -> None:
    args = {"path": archive(), "split": [0.2, 0.4]}
    config = DataConfig(
        function="rapidfire_jax.data.ratings:movie_texts", args=args, train=(0.2, 0.3), held_out=(0.3, 0.4)
    )
    training, _ = load_labelled(config, tokenizer, seed=0, held_out=9, context=512)
    assert {example.label for example in training} <= set(RATINGS.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pairs": 10**6}, r"1,000,000 pairs are wanted, [\d,]+ of snippets of one cell .* lower min_gap or cells"),
        ({"pairs": 0}, "pairs=0, .* give 1 or more"),
        ({"min_gap": 0.0}, "min_gap=0.0; give"),
        ({"split": [0.5]}, r"split=\[0.5\]; give two rising fractions"),
        ({"split": [0.5, 0.5]}, "give two rising fractions"),
    ],
)
def test_says_what_is_wrong(archive: Callable[..., str], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        list(movie_pairs(**{"path": archive()} | arguments))


@pytest.mark.slow
def test_the_real_ratings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(list(movie_texts())) == 10_603  # 10,605 less two duplicates
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    pairs = list(movie_pairs())
    assert len(pairs) == 372_500
    assert sum(pair["margin"] >= 2 for pair in pairs) / len(pairs) == pytest.approx(0.7435, abs=1e-3)


def test_archives_of_another_kind(archive: Callable[..., str], tmp_path: Path) -> None:
    for made, said in (
        ({"name": "other.txt"}, "cannot read hutto_ICWSM_2014/movie.* in it"),
        ({"content": b"1\t0.5"}, "line 1 is '1.*; expected id, rating and text"),
        ({"content": b"1\tgood\ttext"}, "line 1 is '1.*; expected id, rating and text"),
    ):
        with pytest.raises(InputError, match=said):
            list(movie_texts(path=archive(**made)))
    with pytest.raises(InputError, match="cannot read hutto"):
        list(movie_texts(path=str(tmp_path / "none.tar.gz")))

"""Sentences of film reviews that people rated, as preference pairs.

10,605 snippets of Rotten Tomatoes with the ratings, -4 (extremely negative) to 4, of at least 15 raters each, from the
source distribution of vaderSentiment (Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text").
"""

import math
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rapidfire_jax.data.records import locate
from rapidfire_jax.data.splits import fraction
from rapidfire_jax.errors import InputError

ARCHIVE = "sdist://vaderSentiment==3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


class _Snippet(NamedTuple):
    text: str
    rating: float  # mean of all raters
    place: float


def movie_pairs(
    pairs: int | None = None,
    *,
    seed: int = 0,
    min_gap: float = 1.0,
    split: Sequence[float] = (0.0, 1.0),
    cells: int = 100,
    path: str = ARCHIVE,
) -> Iterator[dict[str, Any]]:
    """Random pairs of snippets: {"chosen", "rejected", "margin": difference of their ratings, "split_place"}.

    A snippet lies where its hash says (`data.splits.fraction`) in one of `cells` equal cells of the line [0, 1), and
    both of a pair in the same cell, the middle of which is their `split_place`. So no snippet is in pairs of both
    sides, wherever `data.train` and `data.held_out` end; where they end at a multiple of 1 / `cells`, a snippet is on
    the side that its own hash says. All pairs are equally likely, and none comes twice.

    Args:
      pairs: how many; None for all there are.
      seed: which ones, and in which order.
      min_gap: least difference between the mean ratings, whose own standard error is 0.27 in the median.
      split: range of hashes to take snippets from.
      cells: the more there are, the fewer pairs.
      path: the archive of the ratings, a file or `sdist://` name.

    Raises:
      InputError: no such file, ratings that cannot be read, bad arguments, or fewer pairs than wanted.
    """
    if cells < 1 or not 0 < min_gap <= 8 or (pairs is not None and pairs < 1):
        raise InputError(f"movie_pairs: {pairs=}, {cells=}, {min_gap=}; give 1 or more, and a gap above 0, at most 8")
    snippets = _snippets(path, split)
    by_cell: dict[int, list[int]] = {}
    for i, snippet in enumerate(snippets):
        by_cell.setdefault(math.floor(snippet.place * cells), []).append(i)
    ratings = np.array([snippet.rating for snippet in snippets])
    found = [np.zeros((0, 2), np.int64)]
    for members in by_cell.values():
        better, worse = np.nonzero(ratings[members][:, None] - ratings[members][None, :] >= min_gap - 1e-9)
        found.append(np.array(members)[np.stack([better, worse], axis=1)])
    every = np.concatenate(found)
    if pairs is not None and pairs > len(every):
        raise InputError(
            f"movie_pairs: {pairs:,} pairs are wanted, {len(every):,} of snippets of one cell in {list(split)} are at "
            f"least {min_gap} apart; lower min_gap or cells, or widen split"
        )
    for index in np.random.default_rng(seed).permutation(len(every))[:pairs]:
        chosen, rejected = (snippets[i] for i in every[index])
        yield {
            "chosen": chosen.text,
            "rejected": rejected.text,
            "margin": round(chosen.rating - rejected.rating, 6),
            "split_place": (math.floor(chosen.place * cells) + 0.5) / cells,
        }


def movie_texts(*, split: Sequence[float] = (0.0, 1.0), path: str = ARCHIVE) -> Iterator[dict[str, Any]]:
    """Every snippet in the range of hashes `split`: {"text", "label": its mean rating}.

    Raises:
      InputError: as `movie_pairs`.
    """
    return ({"text": snippet.text, "label": snippet.rating} for snippet in _snippets(path, split))


def _snippets(path: str, split: Sequence[float]) -> list[_Snippet]:
    """Distinct snippets in the range `split`, in the order of the file."""
    if not (len(split) == 2 and 0 <= split[0] < split[1] <= 1):
        raise InputError(f"movie ratings: split={split}; give two rising fractions such as [0.0, 0.95]")
    snippets: dict[str, _Snippet] = {}
    for line, text in enumerate(_read(locate(path)).splitlines(), start=1):
        try:
            _, rating, words = text.split("\t")
            snippet = _Snippet(" ".join(words.split()), float(rating), fraction(words))
        except ValueError:
            raise InputError(
                f"{path}: {SNIPPETS}: line {line} is {text!r:.100}; expected id, rating and text"
            ) from None
        if split[0] <= snippet.place < split[1]:
            snippets.setdefault(snippet.text.lower(), snippet)
    return list(snippets.values())


def _read(path: Path) -> str:
    try:
        with tarfile.open(path) as archive:
            file = archive.extractfile(SNIPPETS)
            assert file is not None
            return file.read().decode("utf-8", errors="replace").strip()
    except (OSError, tarfile.TarError, KeyError, EOFError) as error:
        raise InputError(f"{path}: cannot read {SNIPPETS} in it: {error}") from None

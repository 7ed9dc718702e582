"""Packing puts every example in one row, wastes little, and keeps examples apart."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapidfire_jax.data.batches import Streamed
from rapidfire_jax.data.examples import Completion
from rapidfire_jax.data.packing import PackedRows, PackedStream, bucket_of, pack, packed_batch, right_padded
from rapidfire_jax.errors import InputError


def example(length: int, start: int = 1) -> Completion:
    return Completion(tuple(range(start, start + length)), (True,) * length)


def fewest(lengths: list[int], width: int) -> int:
    """The smallest number of rows, by trying every way."""
    for count in itertools.count(max(1, -(-sum(lengths) // width))):
        for places in itertools.product(range(count), repeat=len(lengths)):
            rooms = [width] * count
            for place, length in zip(places, lengths, strict=True):
                rooms[place] -= length
            if min(rooms) >= 0:
                return count
    raise AssertionError


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 80))
def test_every_example_is_in_one_row(lengths: list[int], width: int) -> None:
    rows = pack(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < total <= width for total in totals)
    assert rows == pack(lengths, width)
    assert len(rows) >= -(-sum(lengths) // width)
    assert len(rows) <= max(-(-2 * sum(lengths) // width), 1)  # any two rows hold more than one width
    for one, other in itertools.combinations(totals, 2):
        assert one + other > width


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_close_to_the_fewest_rows(lengths: list[int]) -> None:
    best = fewest(lengths, 12)
    assert best <= len(pack(lengths, 12)) <= 11 / 9 * best + 1


def test_by_hand() -> None:
    assert pack([3, 5, 2, 5, 4], 8) == [[1, 2], [3, 0], [4]]
    assert pack([8, 8], 8) == [[0], [1]]
    assert pack([], 8) == []
    assert pack([1] * 16, 8) == [list(range(8)), list(range(8, 16))]


def test_many_examples_take_little_time_and_room() -> None:
    lengths = np.random.default_rng(0).integers(1, 1025, 50_000).tolist()
    rows = pack(lengths, 2048)
    assert len(rows) <= 1.001 * sum(lengths) / 2048 + 1


@pytest.mark.parametrize("lengths", [[3, 9], [3, 0]])
def test_what_fits_no_row(lengths: list[int]) -> None:
    with pytest.raises(InputError, match=f"example 1 has {lengths[1]} tokens; a packed row holds 1 to 8"):
        pack(lengths, 8)


def test_a_batch_by_hand() -> None:
    first = Completion((5, 6, 7), (False, True, True))
    second = Completion((8, 9), (True, True))
    tokens, segments, trained = packed_batch([[first, second], [second]], 6)
    assert (tokens.dtype, segments.dtype, trained.dtype) == (np.int32, np.int32, np.bool_)
    assert tokens.tolist() == [[5, 6, 7, 8, 9, 0], [8, 9, 0, 0, 0, 0]]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]
    assert trained.tolist() == [[False, True, True, False, True, False], [False, True, *[False] * 4]]
    with pytest.raises(InputError, match="row 1 of a batch has 7 tokens, its width is 6"):
        packed_batch([[first], [example(7)]], 6)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 7), st.integers(0, 9))
def test_epochs_of_rows(lengths: list[int], size: int, seed: int) -> None:
    examples = [example(length, start=100 * i + 1) for i, length in enumerate(lengths)]
    rows = PackedRows(examples, 12, seed)
    count = -(-2 * len(rows) // size)
    batches = [rows.batch(i, size) for i in range(count)]
    every = np.concatenate([batch.tokens for batch in batches])
    for epoch in range(2):
        tokens = every[epoch * len(rows) : (epoch + 1) * len(rows)]
        wanted = Counter(token for one in examples for token in one.tokens)
        assert Counter(tokens[tokens > 0].tolist()) == wanted
        assert (tokens > 0).mean() == pytest.approx(rows.filled)
    for batch in batches:
        for row, segments in zip(*batch[:2], strict=True):
            for segment in range(1, segments.max() + 1):
                assert tuple(row[segments == segment].tolist()) in {one.tokens for one in examples}
    again = PackedRows(examples, 12, seed).batch(count - 1, size)
    assert all(np.array_equal(one, other) for one, other in zip(again, batches[-1], strict=True))


def test_epochs_pack_different_examples_together() -> None:
    rows = PackedRows([example(3, 10 * i) for i in range(1, 40)], 9, seed=0)
    together = [{frozenset(row.tolist()) for row in rows.batch(epoch, len(rows)).tokens} for epoch in range(2)]
    assert len(together[0] & together[1]) < 3


def test_packed_streams() -> None:
    examples = [example(i % 7 + 1, start=100 * i + 1) for i in range(100)]

    def packed() -> PackedStream:
        return PackedStream(Streamed("numbers", lambda: iter(examples), 0, 20), 12)

    stream = packed()
    batches = [stream.batch(i, 3) for i in range(30)]
    seen = Counter(token for batch in batches for token in batch.tokens[batch.tokens > 0].tolist())
    assert set(seen.values()) <= {1, 2, 3}  # 90 rows of an endless stream, 34 an epoch at least
    assert sum(seen.values()) > 0.8 * 90 * 12
    for one, other in zip(packed().batch(17, 3), batches[17], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("examples", "said"), [([], "no examples"), ([example(9)], "has 9 tokens, a row 8")])
def test_what_cannot_be_packed(examples: list[Completion], said: str) -> None:
    with pytest.raises(InputError, match=said):
        PackedRows(examples, 8, seed=0)


def test_padding_on_the_right() -> None:
    ids, mask = right_padded([(1, 2, 3), (), (4,)], (2, 4, 8), pad_id=7)
    assert ids.tolist() == [[1, 2, 3, 7], [7] * 4, [4, 7, 7, 7]]
    assert mask.sum(axis=1).tolist() == [3, 0, 1]
    assert [bucket_of(length, (8, 2, 4)) for length in (0, 2, 3, 8)] == [2, 2, 4, 8]
    with pytest.raises(InputError, match="sequence of 9 tokens is longer than the largest bucket, 8"):
        right_padded([(1,) * 9], (4, 8))

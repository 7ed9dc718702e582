"""Several examples a row, so that little of a batch is padding."""

import bisect
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool

from rapidfire_jax.algorithms.packing import Packing
from rapidfire_jax.data.batches import Streamed
from rapidfire_jax.data.examples import Completion
from rapidfire_jax.errors import InputError

SIZES = 4  # numbers of rows, and so programs, that a batch of rollouts is rounded up to one of


class PackedBatch(NamedTuple):
    """B rows of S tokens.

    Attributes:
      tokens: int32 [B, S]; 0 on padding, which stands at the right.
      segments: int32 [B, S]; 1, 2, ... on the tokens of the first, second, ... example of a row, 0 on padding.
      trained: bool [B, S]; True on tokens that count in the loss. Never on the first token of an example, which nothing
        predicts.
    """

    tokens: np.ndarray
    segments: np.ndarray
    trained: np.ndarray


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Deals examples to rows of `width` tokens: every index in exactly one row, none of them split.

    Best fit decreasing: from the longest to the shortest, of equals the first one first, each goes into the row that it
    leaves the least room in, and into a new row if it fits nowhere. At most 11/9 of the fewest possible rows, and one,
    are used (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms").

    Raises:
      InputError: a length that is not positive, or longer than a row.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= width:
            raise InputError(f"example {index} has {length} tokens; a packed row holds 1 to {width}")
    rows: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # room -> rows that have it
    rooms: list[int] = []  # the keys of `with_room`, rising
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(rooms, lengths[index])
        if place == len(rooms):
            row, room = len(rows), width
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(index)
        room -= lengths[index]
        if room and room not in with_room:
            bisect.insort(rooms, room)
        if room:
            with_room[room].append(row)
    return rows


def pack_rollouts(attention_mask: Bool[ArrayLike, "B S"], parts: int = 1) -> Packing:
    """Packs rollouts by their lengths, on the host.

    Args:
      attention_mask: True on the real tokens of prompt and response, which stand together.
      parts: R is a multiple of it, and one of at most `SIZES` numbers up to B, so that few programs are compiled; it
        must divide B.
    """
    mask = np.asarray(attention_mask)
    B, S = mask.shape
    starts, lengths = mask.argmax(axis=1), mask.sum(axis=1)
    rows = pack(lengths.tolist(), S)
    source, segments = np.full((B, S), B * S, np.int32), np.zeros((B, S), np.int32)
    for row, members in enumerate(rows):
        end = 0
        for number, member in enumerate(members, start=1):
            begin, end = end, end + lengths[member]
            source[row, begin:end] = member * S + starts[member] + np.arange(lengths[member])
            segments[row, begin:end] = number
    size = next(size for size in _sizes(B, parts) if size >= len(rows))
    return Packing(jnp.asarray(source[:size]), jnp.asarray(segments[:size]))


def _sizes(rows: int, parts: int) -> Sequence[int]:
    """Numbers of rows, rising."""
    return [-(-rows * i // (SIZES * parts)) * parts for i in range(1, SIZES + 1)]


def packed_batch(rows: Sequence[Sequence[Completion]], width: int) -> PackedBatch:
    """Rows of examples as arrays of `width` columns.

    Raises:
      InputError: a row of more than `width` tokens.
    """
    shape = len(rows), width
    batch = PackedBatch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))
    for i, row in enumerate(rows):
        if (total := sum(len(example.tokens) for example in row)) > width:
            raise InputError(f"row {i} of a batch has {total} tokens, its width is {width}")
        start = 0
        for segment, example in enumerate(row, start=1):
            place = i, slice(start, start := start + len(example.tokens))
            batch.tokens[place] = example.tokens
            batch.segments[place] = segment
            batch.trained[place] = (False, *example.trained[1:])
    return batch


def right_padded(
    rows: Sequence[Sequence[int]], buckets: Sequence[int], pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as one array, padded on the right to the smallest bucket that holds the longest row.

    Returns:
      ids int32 [B, S], and mask bool [B, S], True on the tokens of a row.

    Raises:
      InputError: a row is longer than the largest bucket.
    """
    width = bucket_of(max(map(len, rows)), buckets)
    ids = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return ids, mask


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket of at least `length` tokens.

    Raises:
      InputError: there is none.
    """
    if length > max(buckets):
        raise InputError(f"a sequence of {length} tokens is longer than the largest bucket, {max(buckets)}")
    return min(bucket for bucket in buckets if bucket >= length)


@dataclass(frozen=True)
class PackedRows:
    """Examples packed into rows of `width` tokens, every example once an epoch.

    Each epoch packs another permutation of them and shuffles the rows; all epochs have the same number of rows.
    """

    examples: Sequence[Completion]
    width: int
    seed: int

    def __post_init__(self):
        if not self.examples:
            raise InputError("packing: no examples")
        longest = max(len(example.tokens) for example in self.examples)
        if longest > self.width:
            raise InputError(f"packing: an example has {longest} tokens, a row {self.width}; lower data.max_length")

    def __len__(self) -> int:
        """Rows an epoch."""
        return len(self._epoch(0))

    @property
    def filled(self) -> float:
        """The share of an epoch's places that hold tokens, not padding."""
        return sum(len(example.tokens) for example in self.examples) / (len(self) * self.width)

    def batch(self, iteration: int, rows: int) -> PackedBatch:
        """What iteration number `iteration` trains on: a pure function of it.

        The batches of all iterations laid end to end are the rows of one epoch after another.
        """
        epochs, places = np.divmod(iteration * rows + np.arange(rows), len(self))
        chosen = [self._epoch(epoch)[place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]
        return packed_batch([[self.examples[i] for i in row] for row in chosen], self.width)

    @functools.cached_property
    def _epochs(self) -> dict[int, list[list[int]]]:
        return {}

    def _epoch(self, number: int) -> list[list[int]]:
        """Rows of an epoch, as places of examples. The last two epochs asked for are kept."""
        if number not in self._epochs:
            random = np.random.default_rng((self.seed, number))
            order = random.permutation(len(self.examples)).tolist()
            packed = pack([len(self.examples[i].tokens) for i in order], self.width)
            for old in list(self._epochs)[:-1]:
                del self._epochs[old]
            self._epochs[number] = [[order[i] for i in packed[row]] for row in random.permutation(len(packed))]
        return self._epochs[number]


@dataclass(frozen=True)
class PackedStream:
    """A stream packed into rows of `width` tokens.

    As many examples as its buffer holds are packed together, epochs running into each other, and the rows shuffled as
    its examples are.
    """

    stream: Streamed[Completion]
    width: int

    def batch(self, iteration: int, rows: int) -> PackedBatch:
        """What iteration number `iteration` trains on: a pure function of it, at the cost of `Streamed.batch`."""
        return packed_batch(self._rows.batch(iteration, rows), self.width)

    @functools.cached_property
    def _rows(self) -> Streamed[list[Completion]]:
        def packed() -> Iterator[list[Completion]]:
            for window in batched(self.stream.endless(), self.stream.buffer):
                for row in pack([len(example.tokens) for example in window], self.width):
                    yield [window[i] for i in row]

        return Streamed(self.stream.name, packed, self.stream.seed, self.stream.buffer)

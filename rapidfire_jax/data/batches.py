"""Batches as a pure function of the iteration, from examples in memory or from a stream."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from rapidfire_jax.errors import InputError


def batch_indices(iteration: int, batch_size: int, size: int, seed: int) -> np.ndarray:
    """Which of `size` prompts iteration number `iteration` takes, int64 [batch_size].

    The batches of all iterations laid end to end are one permutation of all prompts after another, each drawn anew.
    """
    epochs, places = np.divmod(iteration * batch_size + np.arange(batch_size), size)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(size) for epoch in np.unique(epochs).tolist()}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)])


@dataclass(frozen=True)
class Examples[E](Sequence[E]):
    """Examples in memory, in the order of the data; `left_out` counts records that are too long or unusable."""

    items: tuple[E, ...]
    seed: int
    left_out: int = 0

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[E, ...]: ...
    def __getitem__(self, index: int | slice) -> E | tuple[E, ...]:
        """One example, or those of a slice."""
        return self.items[index]

    def batch(self, iteration: int, batch_size: int) -> list[E]:
        """What iteration number `iteration` trains on; see `batch_indices`."""
        return [self.items[i] for i in batch_indices(iteration, batch_size, len(self.items), self.seed)]


@dataclass
class Streamed[E]:
    """Examples read while they are used, epoch after epoch, each in an order of its own.

    `epoch()` goes through the examples of one epoch, the same ones in the same order each time. A reservoir of `buffer`
    examples shuffles them: each new one takes the place of a random one, which is given out. Given `seed` and `buffer`,
    a batch depends on its iteration alone. What lies before it is read and passed over, so going forward costs no more
    than reading on, and going back starts the first epoch again.
    """

    name: str
    epoch: Callable[[], Iterator[E]]
    seed: int
    buffer: int
    _position: int = field(default=0, init=False, repr=False)
    _stream: Iterator[E] | None = field(default=None, init=False, repr=False)

    def batch(self, iteration: int, batch_size: int) -> list[E]:
        """What iteration number `iteration` trains on: `batch_size` examples from number `iteration * batch_size` on.

        Raises:
          InputError: the data cannot be read, or hold no training examples.
        """
        start = iteration * batch_size
        if self._stream is None or start < self._position:
            self._stream, self._position = self.endless(), 0
        stream, self._stream = self._stream, None  # an error on the way must not leave a half-used stream behind
        for _ in range(start - self._position):
            next(stream)
        batch = [next(stream) for _ in range(batch_size)]
        self._stream, self._position = stream, start + batch_size
        return batch

    def endless(self) -> Iterator[E]:
        """All examples of the first epoch, of the second, and so on; what `batch` cuts into batches."""
        number = 0
        while True:
            empty = True
            for example in self._shuffled(np.random.default_rng((self.seed, number))):
                empty = False
                yield example
            if empty:
                raise InputError(f"{self.name}: no training examples; widen data.train or give more records")
            number += 1

    def _shuffled(self, random: np.random.Generator) -> Iterator[E]:
        reservoir: list[E] = []
        for example in self.epoch():
            if len(reservoir) < self.buffer:
                reservoir.append(example)
                continue
            place = int(random.integers(self.buffer))
            reservoir[place], example = example, reservoir[place]
            yield example
        yield from (reservoir[i] for i in random.permutation(len(reservoir)))

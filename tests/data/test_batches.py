"""Streams: endless, shuffled, and the same after a restart."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapidfire_jax.data.batches import Examples, Streamed
from rapidfire_jax.errors import InputError


def streamed(size: int, *, seed: int = 0, buffer: int = 8) -> Streamed[int]:
    return Streamed("numbers", lambda: iter(range(size)), seed, buffer)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
def test_every_epoch_has_every_example_once(size: int, batch_size: int, buffer: int, seed: int) -> None:
    stream = streamed(size, seed=seed, buffer=buffer)
    count = -(-3 * size // batch_size)
    batches = [stream.batch(i, batch_size) for i in range(count)]
    order = [example for batch in batches for example in batch]
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    for i in (count - 1, 0, count // 2, count // 2):
        assert streamed(size, seed=seed, buffer=buffer).batch(i, batch_size) == batches[i]
        assert stream.batch(i, batch_size) == batches[i]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(streamed(50, seed=seed).batch(epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert sorted(streamed(50).batch(1, 25)) != list(range(25, 50))


def test_a_buffer_holds_examples_back_but_never_ahead() -> None:
    order = streamed(1000, buffer=10).batch(0, 1000)
    assert all(example <= place + 10 for place, example in enumerate(order))
    assert sum(abs(example - place) for place, example in enumerate(order)) > 4000


def test_going_on_reads_no_further_than_it_must() -> None:
    read = []

    def epoch() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    stream = Streamed("numbers", epoch, 0, 4)
    stream.batch(2, 5)
    assert len(read) == 19
    stream.batch(3, 5)
    assert len(read) == 24


def test_streams_of_nothing_and_errors_on_the_way() -> None:
    with pytest.raises(InputError, match="numbers: no training examples"):
        streamed(0).batch(0, 1)
    broken = [True]

    def epoch() -> Iterator[int]:
        yield from range(5)
        if broken:
            raise InputError("row 6")
        yield from range(5, 9)

    stream = Streamed("numbers", epoch, 0, 1)
    assert len(stream.batch(0, 3)) == 3
    with pytest.raises(InputError, match="row 6"):
        stream.batch(1, 3)
    broken.clear()
    assert stream.batch(1, 3) == streamed(9, buffer=1).batch(1, 3)


def test_examples_are_a_sequence() -> None:
    examples = Examples(("a", "b", "c"), seed=1, left_out=2)
    assert (len(examples), examples[0], examples[1:], list(examples)) == (3, "a", ("b", "c"), ["a", "b", "c"])
    assert Counter(examples.batch(0, 2) + examples.batch(1, 2) + examples.batch(2, 2)) == Counter("aabbcc")
    assert examples.batch(1, 2) == Examples(("a", "b", "c"), seed=1).batch(1, 2)

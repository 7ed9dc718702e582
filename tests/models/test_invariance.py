"""A sequence's logits do not depend on what stands around it: padding, its batch, or a row it is packed into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidfire_jax import FlaxAutoModelForCausalLM
from tests.models.test_families import CASES, GOLDEN

WIDTH, ROWS = 40, 3


@jax.jit
def logits(model, tokens, mask):
    return model(tokens, mask)


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return FlaxAutoModelForCausalLM.from_pretrained(str(GOLDEN / request.param))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_surroundings_do_not_matter(model, data):
    """The same sequence alone, shifted among padding beside other rows, and as a segment between others."""
    length = data.draw(st.integers(1, 32), label="length")
    left = data.draw(st.integers(0, WIDTH - length), label="padding on the left")
    row = data.draw(st.integers(0, ROWS - 1), label="row")
    before = data.draw(st.integers(0, WIDTH - length), label="tokens of another segment before it")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), label="seed"))
    sequence = rng.integers(0, model.config.vocab_size, length)
    noise = rng.integers(0, model.config.vocab_size, (3, ROWS, WIDTH)).astype(np.int32)

    def place(start, others):
        tokens, mask = noise[others].copy(), (rng.random((ROWS, 1)) < 0.8) & np.ones((ROWS, WIDTH), bool)
        tokens[row, start : start + length] = sequence
        mask[row] = (np.arange(WIDTH) >= start) & (np.arange(WIDTH) < start + length)
        return tokens, mask

    def result(tokens, mask, start):
        return np.asarray(logits(model, tokens, jnp.asarray(mask, jnp.int32)))[row, start : start + length]

    alone = result(*place(0, 0), 0)
    padded = result(*place(left, 1), left)
    tokens, _ = place(before, 2)
    segments = np.ones((ROWS, WIDTH), np.int32)
    segments[row, before:] = 2
    segments[row, before + length :] = 3
    packed = result(tokens, segments, before)
    scale = np.abs(alone).max()
    np.testing.assert_allclose(padded, alone, rtol=0, atol=2e-5 * scale)
    np.testing.assert_allclose(packed, alone, rtol=0, atol=2e-5 * scale)


def test_bool_and_integer_masks_agree(model):
    mask = np.arange(WIDTH)[None] >= np.array([[0], [9], [30]])
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (ROWS, WIDTH))
    found = logits(model, tokens, mask)
    np.testing.assert_array_equal(
        np.asarray(found)[mask], np.asarray(logits(model, tokens, mask.astype(np.int32)))[mask]
    )

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rapidfire_jax.models.decoder import count_positions
from rapidfire_jax.models.heads import CausalLM
from rapidfire_jax.models.layers import RMSNorm
from rapidfire_jax.models.remat import FULL
from rapidfire_jax.models.rope import Rope, rotate, rotations
from tests.helpers.tiny import TINY, padded_batch, tiny_model
from tests.helpers.tolerances import F32, F32_LONG

forward = nnx.jit(CausalLM.__call__)


@nnx.jit(static_argnames="slots")
def prefill(model, tokens, mask, slots):
    return model.prefill(tokens, mask, slots)


@nnx.jit
def decode(model, *args):
    return model.decode(model.layers(), *args)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm():
    x, scale = normal(0, 3, 5, 24), 1 + normal(1, 24)
    norm = RMSNorm(24, 0.5, dtype=jnp.float32)
    norm.scale[...] = jnp.asarray(scale)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.5) * scale
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, **F32)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_against_complex_rotation(theta):
    x, positions = normal(0, 2, 4, 3, 8), np.array([[0, 0, 1, 2], [3, 40, 500, 6000]])
    frequencies = theta ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * frequencies)
    turns = rotations(Rope(theta=theta), jnp.asarray(positions, jnp.int32), 8)
    # float32 angles of thousands of radians are exact to about 5e-4
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rotate(jnp.asarray(x), *turns), expected, rtol=1e-3, atol=2e-3)
    near = positions < 10
    np.testing.assert_allclose(np.asarray(rotate(jnp.asarray(x), *turns))[near], expected[near], **F32)


def test_positions_count_real_tokens():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(count_positions(mask), [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])


@pytest.mark.parametrize("tied", [False, True])
def test_forward_against_numpy(tied):
    """One unpadded sequence through the whole decoder, in float64."""
    model = tiny_model(tie_embeddings=tied)
    tokens, _ = padded_batch([6], 6)
    p = {name: np.asarray(getattr(model.blocks, name).kernel[...], np.float64) for name in
         ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}  # fmt: skip
    embedding = np.asarray(model.embedding[...], np.float64)

    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + TINY.norm_eps)

    def turn(x):
        half = TINY.head_dim // 2
        angle = np.arange(6)[:, None, None] * TINY.rope.theta ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], -1)

    x = embedding[np.asarray(tokens[0])]
    for i in range(TINY.num_layers):
        q, k, v = ((norm(x) @ p[name][i]).reshape(6, -1, TINY.head_dim) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = turn(q), np.repeat(turn(k), 3, 1), np.repeat(v, 3, 1)
        scores = np.einsum("snh,cnh->nsc", q, k) / np.sqrt(TINY.head_dim)
        weights = np.exp(np.where(np.tril(np.ones((6, 6))) > 0, scores, -np.inf))
        mixed = np.einsum("nsc,cnh->snh", weights / weights.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(6, -1) @ p["o_proj"][i]
        gate = norm(x) @ p["gate_proj"][i]
        x = x + (gate / (1 + np.exp(-gate)) * (norm(x) @ p["up_proj"][i])) @ p["down_proj"][i]
    head = embedding if tied else np.asarray(model.lm_head[...], np.float64)
    np.testing.assert_allclose(forward(model, tokens)[0], norm(x) @ head.T, **F32_LONG)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = tiny_model()
    tokens, _ = padded_batch([5], 5)
    expected = forward(model, tokens)
    widths = ((0, 0), (4, 0) if side == "left" else (0, 4))
    real = slice(4, None) if side == "left" else slice(5)
    mask = jnp.pad(jnp.ones((1, 5), bool), widths)
    for filler in (0, 7):
        padded = jnp.pad(tokens, widths, constant_values=filler)
        np.testing.assert_allclose(forward(model, padded, mask)[:, real], expected, **F32_LONG)


def test_no_token_sees_a_later_one():
    model = tiny_model()
    tokens, _ = padded_batch([8], 8)
    changed = tokens.at[0, 5].set(1)
    before, after = forward(model, tokens), forward(model, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_remat_changes_nothing():
    model = tiny_model()
    tokens, mask = padded_batch([5, 8], 8)
    np.testing.assert_allclose(model.hidden(tokens, mask, remat=FULL), model.hidden(tokens, mask), **F32_LONG)


@pytest.mark.parametrize("prompt", [1, 4])
def test_prefill_and_single_steps_equal_the_full_forward(prompt):
    model = tiny_model()
    width = prompt + 5
    tokens, mask = padded_batch([width, width - prompt + 1], width)  # the second row: one real token in the prompt
    expected = model.hidden(tokens, mask)
    hidden, cache = prefill(model, tokens[:, :prompt], mask[:, :prompt], width)
    found = [hidden]
    for t in range(prompt, width):
        hidden, cache = decode(model, cache, tokens[:, t], mask[:, t])
        found.append(hidden[:, None])
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(cache.ends, [width, width])


def test_a_masked_token_leaves_its_row_as_it_was():
    model = tiny_model()
    tokens, mask = padded_batch([4], 4)
    _, cache = prefill(model, tokens, mask, 8)
    _, skipped = decode(model, cache, jnp.array([9]), jnp.array([False]))
    after_skip, _ = decode(model, skipped, jnp.array([5]), jnp.array([True]))
    direct, _ = decode(model, cache, jnp.array([5]), jnp.array([True]))
    np.testing.assert_allclose(after_skip, direct, **F32_LONG)


def test_value_head_starts_at_zero_and_is_linear():
    model = tiny_model()
    model.add_value_head()
    hidden = jax.random.normal(jax.random.key(0), (2, 3, TINY.hidden_size))
    np.testing.assert_array_equal(model.value(hidden), np.zeros((2, 3), np.float32), strict=True)
    model.value_kernel[...] = jnp.arange(24, dtype=jnp.float32)
    model.value_bias[...] = jnp.float32(2)
    np.testing.assert_allclose(model.value(hidden), np.asarray(hidden) @ np.arange(24) + 2, **F32_LONG)

"""The decode loop against repeated full forward passes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rapidfire_jax import SamplingConfig, generate
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.heads import CausalLM
from tests.helpers.compilations import compilations
from tests.helpers.tiny import TINY, padded_batch, tiny_model
from tests.helpers.tolerances import F32_LONG


def run(model, tokens, mask, key=0, temperature=1.0, **config):
    program = jax.jit(generate, static_argnames="config")
    return program(model, tokens, mask, jax.random.key(key), temperature, config=SamplingConfig(**config))


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_equals_argmax_of_full_forwards(tied):
    model = tiny_model(tie_embeddings=tied)
    tokens, mask = padded_batch([1, 4, 7, 9], 9)
    out = run(model, tokens, mask, max_new_tokens=12, eos_ids=(), greedy=True)
    forward = jax.jit(lambda model, tokens, mask: model(tokens, mask))
    tokens, mask = np.pad(tokens, ((0, 0), (0, 12))), np.pad(mask, ((0, 0), (0, 12)))
    for end in range(9, 21):
        tokens[:, end] = np.argmax(forward(model, tokens, mask)[:, end - 1], axis=-1)
        mask[:, end] = True
    np.testing.assert_array_equal(out.tokens, tokens)
    assert out.mask_t.all() and not out.ended.any()


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_16_bit_weights_and_caches_are_multiplied_as_they_are(kv_heads):
    """Not one of them in float32 in the whole program, whose copy would be read in its place."""
    D, F, V, H = 64, 160, 96, 16
    model = CausalLM(DecoderConfig(V, D, F, 3, D // H, kv_heads, H, 32), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tokens, mask = padded_batch([2, 5, 6], 6)
    program = jax.jit(partial(generate, config=SamplingConfig(10, ())))
    text = program.lower(model, tokens, mask, jax.random.key(0)).compile().as_text()
    narrow, cache = kv_heads * H, f"[3,{kv_heads},16,{H}]"
    shapes = [f"[{m},{n}]" for m, n in ((F, D), (D, F), (D, D), (narrow, D), (D, narrow), (V, D))]
    assert not [shape for shape in (*shapes, cache) if f"f32{shape}" in text]
    assert f"bf16[{F},{D}]" in text and f"bf16{cache}" in text


@pytest.mark.parametrize("decode_batch_size", [None, 2])
def test_log_probabilities_and_values_agree_with_a_full_forward(decode_batch_size):
    model = tiny_model()
    model.add_value_head()
    model.value_kernel[...] = jax.random.normal(jax.random.key(1), (TINY.hidden_size,))
    tokens, mask = padded_batch([2, 5, 6], 6)
    config = {"max_new_tokens": 10, "eos_ids": (5, 9), "decode_batch_size": decode_batch_size}
    out = run(model, tokens, mask, temperature=jnp.float32(0.7), **config)
    hidden = model.hidden(out.tokens, out.attention_mask)[:, 5:-1]
    logps = jax.nn.log_softmax(model.logits(hidden) / jnp.float32(0.7))
    expected = jnp.take_along_axis(logps, out.tokens[:, 6:, None], -1)[..., 0]
    np.testing.assert_allclose(out.logp_t, jnp.where(out.mask_t, expected, 0), **F32_LONG)
    np.testing.assert_allclose(out.v_t, jnp.where(out.mask_t, model.value(hidden), 0), **F32_LONG)


def test_ends_at_eos_and_stops_early():
    model = tiny_model()
    tokens, mask = padded_batch([3, 3, 3, 3], 4)
    free = run(model, tokens, mask, max_new_tokens=8, eos_ids=(), greedy=True)
    eos = tuple({int(free.tokens[0, 4 + 2]), int(free.tokens[1, 4])})
    out = run(model, tokens, mask, max_new_tokens=8, eos_ids=eos, pad_id=66, greedy=True)
    for row, stopped, before in zip(
        np.asarray(out.tokens[:, 4:]), np.asarray(out.mask_t), np.asarray(free.tokens[:, 4:]), strict=True
    ):
        hits = [i for i, token in enumerate(before) if token in eos]
        length = hits[0] + 1 if hits else 8
        assert stopped.tolist() == [True] * length + [False] * (8 - length)
        assert (row[:length] == before[:length]).all() and (row[length:] == 66).all()
    np.testing.assert_array_equal(out.ended, [any(t in eos for t in r) for r in np.asarray(free.tokens[:, 4:])])
    assert (np.asarray(out.logp_t)[~np.asarray(out.mask_t)] == 0).all()


def test_a_row_does_not_depend_on_padding_or_on_its_neighbours():
    model = tiny_model()
    tokens, mask = padded_batch([3, 6], 6)
    wide = jnp.pad(tokens, ((0, 0), (5, 0))), jnp.pad(mask, ((0, 0), (5, 0)))
    together = run(model, tokens, mask, max_new_tokens=7, eos_ids=(), greedy=True)
    wider = run(model, *wide, max_new_tokens=7, eos_ids=(), greedy=True)
    alone = run(model, tokens[:1, 3:], mask[:1, 3:], max_new_tokens=7, eos_ids=(), greedy=True)
    np.testing.assert_array_equal(together.tokens[:, 6:], wider.tokens[:, 11:])
    np.testing.assert_array_equal(together.tokens[:1, 6:], alone.tokens[:, 3:])
    np.testing.assert_allclose(together.logp_t, wider.logp_t, **F32_LONG)


def test_same_key_same_tokens_and_no_new_compilation():
    graphdef, weights = nnx.split(tiny_model())
    tokens, mask = padded_batch([3, 6], 6)
    config = SamplingConfig(8, (2,))
    program = jax.jit(lambda w, k, t: generate(nnx.merge(graphdef, w), tokens, mask, k, t, config=config))
    first = program(weights, jax.random.key(0), jnp.float32(1.0))
    with compilations() as found:
        again = program(weights, jax.random.key(0), jnp.float32(1.0))
        other = program(weights, jax.random.key(1), jnp.float32(0.5))
    assert not found
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (np.asarray(first.tokens) != np.asarray(other.tokens)).any()


@pytest.mark.parametrize(("rows", "lanes"), [(7, 1), (9, 2), (10, 4), (13, 8), (4, 4), (4, 9)])
@pytest.mark.parametrize("int8_cache", [False, True])
def test_a_small_decode_batch_gives_the_responses_of_all_rows_at_once(rows, lanes, int8_cache):
    model = tiny_model()
    model.add_value_head()
    model.value_kernel[...] = jax.random.normal(jax.random.key(1), (TINY.hidden_size,))
    tokens, mask = padded_batch([1 + i % 6 for i in range(rows)], 6)
    config = {"max_new_tokens": 11, "greedy": True, "pad_id": 66, "int8_cache": int8_cache}
    free = np.asarray(run(model, tokens, mask, eos_ids=(), **config).tokens[:, 6:])
    eos_ids = int(free[0, 2]), int(free[1, 5])
    expected = run(model, tokens, mask, eos_ids=eos_ids, **config)
    assert len(set(np.asarray(expected.mask_t).sum(axis=1))) > 1
    found = run(model, tokens, mask, eos_ids=eos_ids, decode_batch_size=lanes, **config)
    for name in ("tokens", "attention_mask", "mask_t", "ended"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.logp_t, expected.logp_t, **F32_LONG)
    np.testing.assert_allclose(found.v_t, expected.v_t, **F32_LONG)


@pytest.mark.parametrize(
    ("prompts", "samples", "lanes"),
    [(3, 4, None), (1, 5, None), (5, 2, 4), (4, 3, 3), (3, 4, 7), (2, 5, 3), (4, 3, 1), (2, 2, 9)],
)
@pytest.mark.parametrize("int8_cache", [False, True])
def test_responses_to_one_prompt_are_those_to_its_copies(prompts, samples, lanes, int8_cache):
    model = tiny_model()
    tokens, mask = padded_batch([1 + i % 6 for i in range(prompts)], 6)
    copies = (jnp.repeat(x, samples, axis=0) for x in (tokens, mask))
    config = {"max_new_tokens": 9, "eos_ids": (5, 9), "int8_cache": int8_cache, "greedy": lanes is not None}
    expected = run(model, *copies, **config)
    found = run(model, tokens, mask, samples_per_prompt=samples, decode_batch_size=lanes, **config)
    for name in ("tokens", "attention_mask", "mask_t", "ended"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.logp_t, expected.logp_t, **F32_LONG)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.heads import CausalLM
from rapidfire_jax.models.lora import PROJECTIONS, add_lora, merge_lora
from rapidfire_jax.models.weights import parameters
from rapidfire_jax.rollout.generate import SamplingConfig, generate
from tests.helpers.tiny import TINY, padded_batch, tiny_model
from tests.helpers.tolerances import F32_LONG

forward = nnx.jit(CausalLM.__call__)


def with_adapters(targets="all-linear", layers=None, **changes):
    """A model whose B matrices are not zero."""
    model = tiny_model(**changes)
    add_lora(model, rank=4, alpha=6.0, targets=targets, key=jax.random.key(1), layers=layers)
    for i, name in enumerate(PROJECTIONS):
        linear = getattr(model.stacks[-1], name)
        if linear.lora_scale is not None:
            linear.lora_b[...] = jax.random.normal(jax.random.key(i), linear.lora_b.shape) * 0.1
    return model


def test_new_adapters_change_nothing():
    tokens, mask = padded_batch([5, 9], 9)
    plain, adapted = tiny_model(), tiny_model()
    add_lora(adapted, rank=2, alpha=4.0, targets="all-linear", key=jax.random.key(0))
    np.testing.assert_array_equal(forward(adapted, tokens, mask), forward(plain, tokens, mask))


def test_leaves_scale_and_independent_matrices():
    model = tiny_model()
    add_lora(model, rank=4, alpha=6.0, targets=("q_proj", "down_proj"), key=jax.random.key(0))
    leaves = parameters(model)
    found = {path: leaf.shape for path, leaf in leaves.items() if "lora" in path}
    assert found == {
        "blocks.q_proj.lora_a": (3, 24, 4), "blocks.q_proj.lora_b": (3, 4, 48),
        "blocks.down_proj.lora_a": (3, 40, 4), "blocks.down_proj.lora_b": (3, 4, 24),
    }  # fmt: skip
    assert len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == 4
    assert (model.blocks.q_proj.lora_scale, model.blocks.k_proj.lora_scale) == (1.5, None)
    a = np.asarray(leaves["blocks.q_proj.lora_a"])
    assert np.abs(a).max() <= 24**-0.5
    assert not np.array_equal(a[0], a[1])
    alone = tiny_model()
    add_lora(alone, rank=4, alpha=6.0, targets="q_proj", key=jax.random.key(0))
    np.testing.assert_array_equal(alone.blocks.q_proj.lora_a[...], a)
    every = tiny_model()
    add_lora(every, rank=4, alpha=6.0, targets="all-linear", key=jax.random.key(0))
    assert not np.array_equal(every.blocks.gate_proj.lora_a[...], every.blocks.up_proj.lora_a[...])


def test_adapted_kernel_is_w_plus_scaled_product():
    model = with_adapters(("v_proj",))
    graphdef, stacked = nnx.split(model.blocks.v_proj)
    linear = nnx.merge(graphdef, jax.tree.map(lambda w: w[1], stacked))
    x = jax.random.normal(jax.random.key(3), (5, TINY.hidden_size))
    w, a, b = (np.asarray(leaf[...], np.float64) for leaf in (linear.kernel, linear.lora_a, linear.lora_b))
    np.testing.assert_allclose(linear(x), np.asarray(x, np.float64) @ (w + 1.5 * a @ b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("targets", "layers"), [("all-linear", None), (("q_proj", "v_proj"), None), ("all-linear", 1)])
def test_merged_model_computes_the_same(targets, layers):
    tokens, mask = padded_batch([5, 9], 9)
    model = with_adapters(targets, layers)
    model.add_value_head()
    merged = merge_lora(model)
    assert set(parameters(merged)) == set(parameters(tiny_model()))
    np.testing.assert_allclose(forward(merged, tokens, mask), forward(model, tokens, mask), **F32_LONG)
    assert np.abs(forward(merged, tokens, mask) - forward(tiny_model(), tokens, mask)).max() > 0.1
    assert model.stacks[-1].q_proj.lora_scale is not None  # the argument is left alone


@pytest.mark.parametrize("layers", [None, 1])
def test_decoding_with_adapters_is_that_of_the_merged_model(layers):
    tokens, mask = padded_batch([5, 9], 9)
    model = with_adapters(layers=layers)
    config = SamplingConfig(max_new_tokens=7, eos_ids=(), greedy=True)
    run = jax.jit(generate, static_argnames="config")
    ours, merged = (run(m, tokens, mask, jax.random.key(0), config=config) for m in (model, merge_lora(model)))
    np.testing.assert_array_equal(ours.tokens, merged.tokens)
    np.testing.assert_allclose(ours.logp_t, merged.logp_t, **F32_LONG)
    assert model.stacks[-1].q_proj.lora_scale == 1.5  # the model itself is left alone
    plain = run(tiny_model(), tokens, mask, jax.random.key(0), config=config)
    assert np.abs(ours.logp_t - plain.logp_t).max() > 1e-2


def test_decoding_in_16_bits_does_not_round_adapters_into_weights():
    tokens, mask = padded_batch([5, 9], 9)
    graphdef, adapters, weights = nnx.split(with_adapters(), nnx.LoRAParam, ...)
    model = nnx.merge(graphdef, adapters, jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights))
    config = SamplingConfig(max_new_tokens=7, eos_ids=())
    out = jax.jit(generate, static_argnames="config")(model, tokens, mask, jax.random.key(0), config=config)
    logps = jax.nn.log_softmax(model(out.tokens, out.attention_mask)[:, 8:-1])
    expected = jnp.take_along_axis(logps, out.tokens[:, 9:, None], -1)[..., 0]
    np.testing.assert_allclose(out.logp_t, expected, atol=0.05)  # three layers, each rounded to 2^-9 several times
    kept = [len(jax.tree.leaves(nnx.state(nnx.merge(*layer[:2]), nnx.LoRAParam))) for layer in model.layers()]
    assert kept == [2 * len(PROJECTIONS)] * TINY.num_layers


def test_merge_under_jit():
    tokens, mask = padded_batch([5, 9], 9)
    graphdef, weights = nnx.split(with_adapters(tie_embeddings=True))
    logits = jax.jit(lambda weights: merge_lora(nnx.merge(graphdef, weights))(tokens, mask))(weights)
    model = nnx.merge(graphdef, weights)
    np.testing.assert_allclose(logits, forward(model, tokens, mask), **F32_LONG)
    np.testing.assert_allclose(forward(merge_lora(model), tokens, mask), logits, **F32_LONG)


def test_merge_keeps_the_dtype():
    model = nnx.merge(*_as_bfloat16(tiny_model()))
    add_lora(model, rank=2, alpha=2.0, targets="all-linear", key=jax.random.key(0))
    assert {str(leaf.dtype) for leaf in parameters(merge_lora(model)).values()} == {"bfloat16"}


def _as_bfloat16(model):
    graphdef, weights = nnx.split(model)
    return graphdef, jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), "qproj", ()])
def test_unknown_targets(targets):
    with pytest.raises(InputError, match="this model has all-linear or any of q_proj, k_proj"):
        add_lora(tiny_model(), rank=2, alpha=2.0, targets=targets, key=jax.random.key(0))

"""Dtypes of parameters, activations and logits are chosen apart."""

import jax.numpy as jnp
import numpy as np
import pytest

from rapidfire_jax import FlaxAutoModelForCausalLM, SamplingConfig, generate, make_policy
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.weights import parameters
from tests.helpers.tiny import padded_batch, tiny_model

TOKENS, MASK = padded_batch([4, 7], 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("precision") / "m"
    save_pretrained(tiny_model(), path)
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compute", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("output", ["float32", "bfloat16"])
def test_policy(folder, dtype, compute, output):
    model = FlaxAutoModelForCausalLM.from_pretrained(folder, dtype=dtype, compute_dtype=compute, output_dtype=output)
    assert {leaf.dtype.name for leaf in parameters(model).values()} == {dtype}
    hidden = model.hidden(TOKENS, MASK)
    assert hidden.dtype == (compute or dtype)
    assert model.prefill(TOKENS, MASK, 9)[1].layers[0].keys.dtype == (compute or dtype)
    logits = model.logits(hidden)
    assert logits.dtype == output
    exact = np.asarray(tiny_model()(TOKENS, MASK))
    error = np.abs(np.asarray(logits, np.float32) - exact).max() / np.abs(exact).max()
    low = "bfloat16" in (dtype, compute, output)
    assert error < (0.1 if low else 0.01 if dtype == "float16" else 1e-6)


def test_float32_weights_in_bfloat16_arithmetic_have_float32_gradients(folder):
    import jax

    model = FlaxAutoModelForCausalLM.from_pretrained(folder, compute_dtype="bfloat16")
    policy, frozen, trainable = make_policy(model, jax.random.key(0), lora=None)

    def loss(trainable):
        return policy.apply(frozen, trainable, policy.encode(frozen, TOKENS, MASK), 3, 1.0).logp_t.sum()

    gradients = jax.grad(loss)(trainable)
    assert {g.dtype.name for g in jax.tree.leaves(gradients)} == {"float32"}


def test_generation_keeps_statistics_in_float32(folder):
    import jax

    model = FlaxAutoModelForCausalLM.from_pretrained(
        folder, dtype="bfloat16", compute_dtype="bfloat16", output_dtype="bfloat16"
    )
    out = generate(model, TOKENS, MASK, jax.random.key(0), config=SamplingConfig(max_new_tokens=3, eos_ids=()))
    assert out.logp_t.dtype == jnp.float32


def test_as_stored(folder):
    model = FlaxAutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {leaf.dtype.name for leaf in parameters(model).values()} == {"float32"}


def test_dtypes_as_objects(folder):
    model = FlaxAutoModelForCausalLM.from_pretrained(folder, dtype=jnp.float16, compute_dtype=np.dtype("float32"))
    assert (model.embedding.dtype, model.hidden(TOKENS).dtype) == ("float16", "float32")
    with pytest.raises(InputError, match="dtype 'int8' is not supported"):
        FlaxAutoModelForCausalLM.from_pretrained(folder, dtype=jnp.int8)

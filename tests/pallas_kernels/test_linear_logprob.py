"""linear_logprob against the materialised form and against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_logprob
from pallas_kernels.linear_logprob.reference import linear_logprob_reference
from tests.helpers.tolerances import F32


def problem(rows, width, vocabulary, scale=1.0, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden = jax.random.normal(keys[0], (rows, width)) * scale
    head = jax.random.normal(keys[1], (vocabulary, width))
    targets = jax.random.randint(keys[2], (rows,), 0, vocabulary)
    weights = jax.random.normal(keys[3], (rows,)), jax.random.normal(keys[4], (rows,))
    return hidden, head, targets, weights


@pytest.mark.parametrize(("vocabulary", "chunk"), [(96, 32), (97, 32), (97, 97), (31, 64), (65, 64), (1, 8)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_agrees_with_numpy_float64(vocabulary, chunk, temperature):
    hidden, head, targets, _ = problem(7, 16, vocabulary)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / temperature
    shifted = logits - logits.max(1, keepdims=True)
    logps = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    out = linear_logprob(hidden, head, targets, temperature=temperature, chunk=chunk)
    np.testing.assert_allclose(out.logp, logps[np.arange(7), np.asarray(targets)], **F32)
    np.testing.assert_allclose(out.entropy, -(np.exp(logps) * logps).sum(1), **F32)


@pytest.mark.parametrize(("vocabulary", "chunk"), [(96, 32), (97, 32), (31, 64)])
def test_gradients_agree_with_the_materialised_form(vocabulary, chunk):
    hidden, head, targets, (a, b) = problem(9, 16, vocabulary)

    def loss(function):
        def f(hidden, head):
            logp, entropy = function(hidden, head)
            return (a * logp).sum() + (b * entropy).sum()

        return jax.grad(f, argnums=(0, 1))(hidden, head)

    ours = loss(lambda h, w: linear_logprob(h, w, targets, temperature=0.7, chunk=chunk))
    truth = loss(lambda h, w: linear_logprob_reference(h, w, targets, 0.7))
    for mine, true in zip(ours, truth, strict=True):
        np.testing.assert_allclose(mine, true, **F32)


def test_huge_logits_stay_finite():
    hidden, head, targets, _ = problem(5, 16, 50, scale=1e4)
    value, gradient = jax.value_and_grad(lambda h: linear_logprob(h, head, targets, chunk=16).logp.sum())(hidden)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    entropy_gradient = jax.grad(lambda h: linear_logprob(h, head, targets, chunk=16).entropy.sum())(hidden)
    assert np.isfinite(entropy_gradient).all()


def test_leading_axes_vmap_and_bfloat16():
    hidden, head, targets, _ = problem(12, 16, 40)
    flat = linear_logprob(hidden, head, targets, chunk=16)
    folded = linear_logprob(hidden.reshape(3, 4, 16), head, targets.reshape(3, 4), chunk=16)
    mapped = jax.vmap(lambda h, t: linear_logprob(h, head, t, chunk=16))(
        hidden.reshape(3, 4, 16), targets.reshape(3, 4)
    )
    np.testing.assert_array_equal(folded.logp.reshape(-1), flat.logp)
    np.testing.assert_allclose(mapped.entropy.reshape(-1), flat.entropy, **F32)
    half = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    truth = linear_logprob_reference(*(x.astype(jnp.float32) for x in half), targets, 1.0)
    low = linear_logprob(*half, targets, chunk=16)
    assert low.logp.dtype == jnp.float32
    np.testing.assert_allclose(low.logp, truth[0], atol=1e-4, rtol=1e-4)  # products are exact, sums are in float32


def test_never_holds_all_logits():
    hidden, head, targets, _ = problem(64, 8, 4096)
    loss = jax.jit(jax.grad(lambda h: linear_logprob(h, head, targets, chunk=256).logp.sum()))
    assert "f32[64,4096]" not in loss.lower(hidden).compile().as_text()


def test_shapes_that_do_not_fit():
    hidden, head, targets, _ = problem(4, 16, 40)
    with pytest.raises(ValueError, match=r"\(4, 16\)"):
        linear_logprob(hidden, head[:, :8], targets)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        linear_logprob(hidden, head, targets[:3])

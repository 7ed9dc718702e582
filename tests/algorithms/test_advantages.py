"""GAE against a loop written from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidfire_jax import gae
from tests.helpers.tolerances import F32


def gae_loop(r, v, mask, gamma, lam):
    """Sum of discounted residuals over the real positions of each row, as in eq. 16; float64, no recursion shared."""
    adv = np.zeros_like(r)
    for b in range(len(r)):
        steps = [t for t in range(r.shape[1]) if mask[b, t]]
        values = [v[b, t] for t in steps] + [0.0]
        deltas = [r[b, t] + gamma * values[i + 1] - values[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            adv[b, t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
    return adv


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_agrees_with_the_sum(seed, gamma, lam):
    rng = np.random.default_rng(seed)
    r, v = rng.normal(size=(2, 5, 9))
    mask = rng.random((5, 9)) < 0.7  # gaps, and often an empty or a full row
    mask[0] = False
    r32, v32 = jnp.asarray(r, jnp.float32), jnp.asarray(v, jnp.float32)
    adv, returns = gae(r32, v32, jnp.asarray(mask), jnp.float32(gamma), jnp.float32(lam))
    expected = gae_loop(r, v, mask, gamma, lam)
    np.testing.assert_allclose(adv, expected, **F32)
    np.testing.assert_allclose(returns, np.where(mask, expected + v, 0), **F32)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_masked_positions_have_no_effect(poison):
    mask = np.array([[True, True, False], [False, False, False]])
    r, v = np.ones((2, 2, 3), np.float32)
    clean = gae(jnp.asarray(r), jnp.asarray(v), jnp.asarray(mask), 1.0, 0.95)
    dirty = gae(
        *(jnp.asarray(np.where(mask, x, poison).astype(np.float32)) for x in (r, v)), jnp.asarray(mask), 1.0, 0.95
    )
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def test_integer_rewards_become_float():
    adv, _ = gae(jnp.ones((1, 2), jnp.int32), jnp.zeros((1, 2)), jnp.ones((1, 2), bool), 0.5, 1.0)
    assert adv.dtype == jnp.float32
    np.testing.assert_allclose(adv, [[1.5, 1.0]])


def test_gradient_flows_to_values():
    g = jax.grad(lambda v: gae(jnp.zeros((1, 3)), v, jnp.array([[True, True, False]]), 1.0, 0.0)[0].sum())(
        jnp.ones((1, 3))
    )
    np.testing.assert_allclose(g, [[-1.0, 0.0, 0.0]])

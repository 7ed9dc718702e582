"""Estimators of KL, advantages and returns, aggregation and whitening against loops written from the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidfire_jax import (
    adapt_kl_coef,
    discounted_returns,
    gae,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
)
from rapidfire_jax.algorithms.advantages import informative_groups
from rapidfire_jax.algorithms.masking import aggregate, last_position, masked_mean, masked_variance, whiten
from rapidfire_jax.algorithms.sft import next_token_mask
from tests.helpers import oracles
from tests.helpers.tolerances import F32

B, T = 4, 6
ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
SEEDS = st.integers(0, 10_000)


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def masked(seed, rows=B):
    """With gaps, an empty row, a full one, and one of a single token."""
    mask = np.random.default_rng(seed).random((rows, T)) < 0.6
    mask[:3] = False
    mask[1], mask[2, seed % T] = True, True
    return mask


def test_kl_and_its_gradient():
    logp, ref = np.float64(drawn(0, 40)) - 2, np.float64(drawn(1, 40)) - 2

    @jax.jit
    def ours(logp, ref):
        gradient = lambda f: jax.grad(lambda x, y: f(x, y).sum(), argnums=(0, 1))(logp, ref)  # noqa: E731
        named = {name: functools.partial(kl_estimate, estimator=name) for name in ESTIMATORS}
        return {name: (f(logp, ref), *gradient(f)) for name, f in named.items()}

    with jax.enable_x64(True):
        found = ours(logp, ref)
        for name, (values, gradient, of_reference) in found.items():
            plain = name.removesuffix("+")
            expected = [oracles.kl(plain, p, r) for p, r in zip(logp, ref, strict=True)]
            np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-14)
            descent = "k2" if name.endswith("+") else plain
            slopes = [
                oracles.slope(lambda x, r=r, e=descent: oracles.kl(e, x, r), p) for p, r in zip(logp, ref, strict=True)
            ]
            np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-8)
            assert (np.asarray(of_reference) == 0).all()


def test_expected_gradients_of_the_kl():
    """Under the policy: k2's is that of the KL divergence, k1's is 0, and the straight-through ones are k2's."""
    with jax.enable_x64(True):
        logits, ref = np.float64(drawn(2, 5)), jax.nn.log_softmax(np.float64(drawn(3, 5)))

        @jax.jit
        def gradients(logits):
            p = jax.lax.stop_gradient(jax.nn.softmax(logits))

            def expected(estimator):
                return jax.grad(lambda x: (p * kl_estimate(jax.nn.log_softmax(x), ref, estimator)).sum())(logits)

            def divergence(x):
                return (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - ref)).sum()

            return {name: expected(name) for name in ESTIMATORS}, jax.grad(divergence)(logits)

        found, exact = gradients(logits)
        for name in ("k2", "k1+", "k3+", "abs+"):
            np.testing.assert_allclose(found[name], exact, atol=1e-12)
        np.testing.assert_allclose(found["k1"], np.zeros(5), atol=1e-12)


def test_k3_of_a_token_that_the_reference_all_but_excludes_is_finite():
    apart = jnp.array([100.0, -100.0, 0.0])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: kl_estimate(x, jnp.zeros(3), "k3").sum()))(apart)
    assert np.isfinite(value) and np.isfinite(gradient).all()


adapted = jax.jit(adapt_kl_coef)


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-4, 1), st.floats(0, 50), st.floats(0.1, 20), st.floats(1e3, 1e5), st.integers(1, 512))
def test_adaptive_coefficient(coef, kl, target, horizon, responses):
    """Ziegler et al. 2019, sec. 2.2."""
    error = min(max((kl - target) / target, -0.2), 0.2)
    numbers = {"target": target, "horizon": horizon, "responses": responses}
    ours = adapted(np.float32(coef), np.float32(kl), **jax.tree.map(np.float32, numbers))
    np.testing.assert_allclose(ours, coef * (1 + responses / horizon * error), rtol=1e-5)


@jax.jit
def estimates(r, v, mask, gamma, lam, next_v):
    adv, target = gae(r, v, mask, gamma, lam, next_v)
    return {
        "gae": (adv, target),
        "without": gae(r, v, mask, gamma, lam),
        "returns": discounted_returns(r, mask, gamma),
        "last": last_position(mask),
        "mean": masked_mean(r, mask),
        "variance": masked_variance(r, mask),
        "white": whiten(r, mask),
        "scaled": whiten(r, mask, keep_mean=True),
        **{how: aggregate(r, mask, how) for how in ("token", "sequence", "fixed")},
    }


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
def test_estimates_over_tokens(seed, gamma, lam):
    r, v, next_v, mask = 3 * drawn(seed, B, T) + 1, drawn(seed + 1, B, T), drawn(seed + 2, B), masked(seed)
    ours = estimates(r, v, mask, np.float32(gamma), np.float32(lam), next_v)
    for name, bootstrap in (("gae", next_v), ("without", None)):
        adv = oracles.gae(np.float64(r), np.float64(v), mask, gamma, lam, bootstrap)
        np.testing.assert_allclose(ours[name][0], adv, **F32)
        np.testing.assert_allclose(ours[name][1], np.where(mask, adv + v, 0), **F32)
    np.testing.assert_allclose(ours["returns"], oracles.returns(np.float64(r), mask, gamma), **F32)
    last = [[t == row[-1] for t in range(T)] if row else [False] * T for row in oracles.steps(mask)]
    np.testing.assert_array_equal(ours["last"], last)
    np.testing.assert_allclose(ours["mean"], r[mask].mean(), **F32)
    np.testing.assert_allclose(ours["variance"], np.float64(r)[mask].var(ddof=1), **F32)
    np.testing.assert_allclose(ours["white"], oracles.whiten(np.float64(r), mask), **F32)
    np.testing.assert_allclose(ours["scaled"], oracles.whiten(np.float64(r), mask, keep_mean=True), **F32)
    for how in ("token", "sequence", "fixed"):
        np.testing.assert_allclose(ours[how], oracles.aggregate(np.float64(r), mask, how), **F32)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_nothing_is_read_where_the_mask_is_false(poison):
    mask, half = masked(5), np.float32(0.5)
    clean = r, v = drawn(5, B, T), drawn(6, B, T)
    dirty = [np.where(mask, x, np.float32(poison)) for x in clean]
    ours, expected = (estimates(*pair, mask, half, half, drawn(7, B)) for pair in (dirty, (r, v)))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_an_empty_mask():
    r = drawn(5, B, T)
    ours = estimates(r, r, np.zeros((B, T), bool), np.float32(1.0), np.float32(1.0), drawn(7, B))
    for leaf in jax.tree.leaves(ours):
        assert (np.asarray(leaf) == 0).all()


@functools.cache
def of_groups(size):
    return jax.jit(
        lambda score: (
            group_advantages(score, size, "std"),
            group_advantages(score, size, "none"),
            leave_one_out_advantages(score, size),
            informative_groups(score, size),
        )
    )


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([2, 3, 8]), st.sampled_from([1e-3, 1.0, 100.0]))
def test_advantages_within_groups(seed, size, scale):
    score = (scale * drawn(seed, 3 * size)).astype(np.float32)
    score[:size] = score[0]
    std, none, others, informative = of_groups(size)(score)
    exact = np.float64(score)
    error = {"rtol": 1e-4, "atol": 1e-5 * max(scale, 1.0)}
    np.testing.assert_allclose(std[size:], oracles.group_relative(exact, size, "std")[size:], **error)
    np.testing.assert_allclose(none, oracles.group_relative(exact, size, "none"), **error)
    np.testing.assert_allclose(others, oracles.leave_one_out(exact, size), **error)
    np.testing.assert_array_equal(informative, np.repeat([len(set(g)) > 1 for g in score.reshape(3, size)], size))


CONSTANT = 0.1, -3.3, 100.1, 1000.1, 1e6 + 0.1


def test_responses_scored_alike_have_no_advantage():
    for size in (3, 5, 7, 8):
        for score in CONSTANT:
            std, none, others, _ = of_groups(size)(np.full(2 * size, score, np.float32))
            for advantages in (std, none, others):
                np.testing.assert_array_equal(advantages, np.zeros(2 * size))


@jax.jit
def whitened(x, mask):
    return whiten(x, mask)


def test_constants_are_whitened_to_nothing():
    for score in CONSTANT:
        for seed in range(5):
            white = whitened(np.full((7, T), score, np.float32), masked(seed, 7))
            np.testing.assert_allclose(white, np.zeros((7, T)), atol=1e-3)


def test_groups_that_do_not_fit():
    with pytest.raises(ValueError, match="5 responses cannot be cut into groups of 2"):
        group_advantages(jnp.zeros(5), 2)
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out_advantages(jnp.zeros(5), 1)
    np.testing.assert_array_equal(group_advantages(jnp.array([3.0, -1.0]), 1), np.zeros(2))


def test_which_tokens_count_in_a_packed_row():
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 2, 2, 2, 0, 0, 0, 0], [0] * 8])
    trained = np.array([[0, 1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 0, 0, 0, 1], [1] * 8], bool)
    expected = np.zeros((3, 7), bool)
    for b in range(3):
        for s in range(1, 8):
            expected[b, s - 1] = trained[b, s] and segments[b, s] != 0 and segments[b, s - 1] == segments[b, s]
    np.testing.assert_array_equal(next_token_mask(jnp.asarray(trained), jnp.asarray(segments)), expected)
    assert expected.sum() == 4

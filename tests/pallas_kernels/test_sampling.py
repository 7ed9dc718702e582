"""sample: the kernels simulated against the reference, the reference against NumPy that sorts, and draws counted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pallas_kernels import hopper, sample, tuning
from pallas_kernels.numerics import LOG2E
from pallas_kernels.sampling.mosaic_gpu import Config, ThresholdConfig
from pallas_kernels.sampling.reference import exponential, key_bits, search, threshold
from tests.helpers.agreement import assert_agrees, normal
from tests.helpers.cases import spread

KEY = jax.random.key(11)
LIKELY = 1e-3  # a chi-square test with a fixed seed must not be less likely than this


def keep(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What a row keeps, by sorting; float64."""
    x = np.asarray(logits, np.float64)
    p = chances(x, temperature)
    kept = np.ones(len(x), bool)
    if 0 < top_k < len(x):
        kept = x >= np.sort(x)[-top_k]
    if top_p < 1:
        q = np.where(kept, p, 0) / p[kept].sum()
        order = np.argsort(-x, kind="stable")
        before = np.cumsum(q[order]) - q[order]
        kept &= x >= x[order][before < top_p].min()
    return kept & (p >= min_p * p.max() * (1 - 1e-6))


def chances(x, temperature=1.0, kept=True):
    """Softmax over what is kept; float64."""
    x = np.where(kept, np.asarray(x, np.float64) / temperature, -np.inf)
    p = np.exp(x - x.max())
    return p / p.sum()


# The kernels

PLAIN = [
    *itertools.product((1, 3), (128, 131, 1000, 2600), ("float32", "bfloat16"), ({}, {"greedy": True})),
    (2, 257, "float32", {"temperature": 0.3}),
    (2, 514, "bfloat16", {"temperature": jnp.array([0.5, 1.7])}),
]
TRUNCATED = [
    (2, 128, "float32", {"top_k": 1}),
    (1, 300, "float32", {"top_k": 7}),
    (2, 131, "bfloat16", {"top_k": 20}),
    (1, 2600, "bfloat16", {"top_k": 50, "temperature": 0.7}),
    (1, 128, "float32", {"top_p": 0.5}),
    (2, 300, "bfloat16", {"top_p": jnp.array([0.2, 1.0]), "temperature": 1.5}),
    (1, 2100, "float32", {"top_p": jnp.float32(0.9)}),
    (3, 131, "float32", {"min_p": 0.2}),
    (2, 1111, "bfloat16", {"min_p": jnp.array([0.0, 1.0])}),
    (1, 200, "float32", {"top_k": 30, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3}),
    (2, 516, "bfloat16", {"top_k": 30, "top_p": 0.8, "min_p": 0.05}),
]


def simulate(logits, key=KEY, **options):
    def function(logits, key, implementation):
        return sample(logits, key, implementation=implementation, **options)

    assert_agrees("sampling", function, (logits, key))


@pytest.mark.parametrize(("rows", "vocabulary", "dtype", "options"), spread(PLAIN + TRUNCATED, 10))
def test_kernels_draw_what_the_reference_draws(rows, vocabulary, dtype, options):
    simulate(normal(vocabulary, (rows, vocabulary), dtype, scale=3), **options)


@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("options", [{}, {"greedy": True}])
def test_splits_of_a_row_are_combined(splits, options):
    logits = jnp.round(normal(0, (2, 1701)))  # three whole steps and a rest; many are equal
    with tuning.trial(sampling_forward=Config(splits)):
        simulate(logits, **options)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}])
def test_warpgroups_share_the_search(options):
    with tuning.trial(sampling_threshold=ThresholdConfig(2)):
        simulate(normal(1, (1, 1701), jnp.bfloat16, scale=2), **options)


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"top_k": 4}, {"top_p": 0.5}])
def test_kernels_with_equal_excluded_and_missing_logits(options):
    logits = jnp.round(normal(2, (4, 150)))
    logits = logits.at[0, ::2].set(-jnp.inf).at[1].set(-jnp.inf).at[2].set(0.0).at[3, 5].set(jnp.nan)
    simulate(logits, **options)


# Noise


def test_noise_is_exponential_and_independent_of_its_neighbours():
    words = jax.random.bits(KEY, (1000, 2), jnp.uint32)
    columns = jax.lax.broadcasted_iota(jnp.uint32, (1000, 1000), 1)
    noise = np.asarray(exponential((words[:, :1], words[:, 1:]), columns), np.float64) / LOG2E
    assert np.isfinite(noise).all() and (noise > 0).all()
    assert stats.kstest(noise.ravel()[::7], "expon").pvalue > LIKELY
    u = np.exp(-noise)
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u[:, 2:], u[:, :-2]), (u[:, 256:], u[:, :-256])):
        table = np.histogram2d(a.ravel(), b.ravel(), 16, ((0, 1), (0, 1)))[0]
        assert stats.chi2_contingency(table).pvalue > LIKELY
    # The smallest of a row decide: their number below 1/1000 is that of independent ones.
    below = np.bincount((noise < 1e-3).sum(axis=1), minlength=8)
    wanted = stats.binom.pmf(np.arange(5), 1000, -np.expm1(-1e-3))
    wanted = 1000 * np.append(wanted, 1 - wanted.sum())
    assert stats.chisquare(np.append(below[:5], below[5:].sum()), wanted).pvalue > LIKELY


def test_noise_of_successive_keys_is_independent():
    def noise(seed):
        words = jax.random.bits(jax.random.key(seed), (1, 2), jnp.uint32)[0]
        return np.exp(-np.asarray(exponential((words[0], words[1]), jnp.arange(200_000, dtype=jnp.uint32))) / LOG2E)

    for seed in range(5):
        table = np.histogram2d(noise(seed), noise(seed + 1), 16, ((0, 1), (0, 1)))[0]
        assert stats.chi2_contingency(table).pvalue > LIKELY


# Draws

TRUNCATIONS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.15},
    {"top_k": 8, "top_p": 0.8, "temperature": 1.5},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.1, "temperature": 1.2},
]


@pytest.mark.parametrize("options", TRUNCATIONS)
@pytest.mark.parametrize("over", ["rows", "keys"])
def test_tokens_are_drawn_as_often_as_they_are_likely(options, over):
    n, row = 20_000, normal(5, (18,))
    if over == "rows":
        drawn = sample(jnp.broadcast_to(row, (n, 18)), KEY, **options).token
    else:
        drawn = jax.vmap(lambda key: sample(row[None], key, **options).token[0])(jax.random.split(KEY, n))
    kept = keep(row, **options)
    wanted = n * chances(row, options.get("temperature", 1.0), kept)
    counts = np.bincount(drawn, minlength=18)
    assert not counts[~kept].any()
    assert stats.chisquare(counts[kept], wanted[kept]).pvalue > LIKELY


def test_a_flat_vocabulary_is_drawn_from_evenly():
    drawn = sample(jnp.zeros((4096, 5000)), KEY).token
    assert stats.chisquare(np.bincount(np.asarray(drawn) // 100, minlength=50)).pvalue > LIKELY


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([0, 1, 3, 10, 36]),
    st.floats(0.05, 1.0),
    st.floats(0, 1),
    st.floats(0.2, 3.0),
    st.booleans(),
)
def test_keeps_what_sorting_keeps(seed, dtype, top_k, top_p, min_p, temperature, equal):
    x = normal(seed, (3, 37), dtype, scale=2)
    x = jnp.round(x) if equal else x
    x32, scale = x.astype(jnp.float32), jnp.full(3, LOG2E / temperature)
    peak = x32.max(axis=1)
    mass = jnp.exp2((x32 - peak[:, None]) * scale[:, None])
    key = search(x32, mass, top_k, jnp.full(3, top_p), key_bits(x.dtype))
    kept = np.asarray(x32 > threshold(key, peak, scale, jnp.full(3, min_p), key_bits(x.dtype))[:, None])
    for found, row in zip(kept, np.asarray(x32), strict=True):
        # The last token kept may go either way where its probability makes the sum exactly top_p, or min_p's bound.
        least = keep(row, temperature, top_k, top_p - 1e-5, min(min_p * (1 + 1e-5), 1.0))
        most = keep(row, temperature, top_k, top_p + 1e-5, min_p * (1 - 1e-5))
        assert (least <= found).all() and (found <= most).all() and found[row.argmax()]


# Log-probabilities


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"top_k": 3, "top_p": 0.5}])
def test_logp_is_that_of_the_whole_distribution(scale, options):
    logits = normal(0, (6, 500), scale=scale)
    token, logp = sample(logits, KEY, temperature=0.7, **options)
    x = np.asarray(logits, np.float64) / 0.7
    wanted = x - x.max(axis=1, keepdims=True)
    wanted -= np.log(np.exp(wanted).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logp, wanted[np.arange(6), token], rtol=1e-5, atol=1e-5)
    assert token.dtype == jnp.int32 and logp.dtype == jnp.float32


def test_greedy_takes_the_first_of_the_most_likely_and_needs_no_key():
    token, logp = sample(jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]), None, greedy=True)
    np.testing.assert_array_equal(token, [1, 0])
    np.testing.assert_allclose(logp, [-np.log(2 + np.exp(-2)), -np.log(3)], rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_minus_infinity_and_nan_are_never_drawn(options):
    rows = jnp.array([[-jnp.inf, 1.0, -jnp.inf], [jnp.nan, 1.0, -jnp.inf], [-jnp.inf] * 3, [jnp.nan] * 3])
    for seed in range(20):
        token, logp = sample(rows, jax.random.key(seed), **options)
        np.testing.assert_array_equal(token, [1, 1, 0, 0])
        np.testing.assert_array_equal(logp, [0.0, np.nan, np.nan, np.nan])


@pytest.mark.parametrize("options", [{"top_p": jnp.float32(0)}, {"min_p": jnp.float32(2)}, {"top_k": 1}])
def test_the_most_likely_token_is_always_kept(options):
    logits = normal(0, (50, 30))
    np.testing.assert_array_equal(sample(logits, KEY, **options).token, logits.argmax(axis=1))


def test_a_traced_one_and_zero_keep_everything_too():
    logits = normal(0, (200, 40), scale=5)
    everything = sample(logits, KEY)
    for options in ({"top_p": jnp.float32(1)}, {"min_p": jnp.float32(0)}, {"top_k": 40}, {"top_k": 99}):
        np.testing.assert_array_equal(sample(logits, KEY, **options).token, everything.token)


# Transformations


def test_vmap_over_settings():
    logits, temperature, top_p = normal(0, (4, 50)), jnp.array([0.5, 1.0, 2.0]), jnp.array([0.3, 0.9, 1.0])
    mapped = jax.vmap(lambda t, p: sample(logits, KEY, temperature=t, top_p=p))(temperature, top_p)
    for i in range(3):
        one = sample(logits, KEY, temperature=temperature[i], top_p=top_p[i])
        np.testing.assert_array_equal(mapped.token[i], one.token)
        np.testing.assert_allclose(mapped.logp[i], one.logp, rtol=1e-5, atol=1e-6)


def test_vmap_of_the_kernels():
    logits = normal(0, (2, 1, 150), scale=2)

    def function(logits, implementation=None):
        return jax.vmap(lambda x: sample(x, KEY, top_k=5, implementation=implementation))(logits)

    with hopper.simulated():
        found = function(logits, "mosaic_gpu")
    np.testing.assert_array_equal(found.token, function(logits).token)


def test_no_gradient_flows_and_checkpoint_changes_nothing():
    logits = normal(0, (3, 40))

    def logp(logits, temperature):
        return sample(logits, KEY, temperature=temperature, top_p=0.9, min_p=0.1).logp.sum()

    for gradient in jax.grad(logp, (0, 1))(logits, 0.8):
        assert not np.any(gradient)
    assert jax.checkpoint(logp)(logits, 0.8) == logp(logits, 0.8)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"logits int32\(2, 3\) are not floats \[B, V\]"):
        sample(jnp.zeros((2, 3), jnp.int32), KEY)
    with pytest.raises(ValueError, match=r"top_k=-1; accepted: 0 \(off\) or more"):
        sample(jnp.zeros((2, 3)), KEY, top_k=-1)
    with pytest.raises(ValueError, match=r"temperature=0\.0; accepted: above 0"):
        sample(jnp.zeros((2, 3)), KEY, temperature=0.0)
    with pytest.raises(ValueError, match=r"top_p=1\.5; accepted: above 0, up to 1"):
        sample(jnp.zeros((2, 3)), KEY, top_p=1.5)
    with pytest.raises(ValueError, match=r"min_p=-0\.1; accepted: 0 to 1"):
        sample(jnp.zeros((2, 3)), KEY, min_p=-0.1)
    with pytest.raises(ValueError, match=r"temperature \(3,\) is neither one number nor one a row, \[2\]"):
        sample(jnp.zeros((2, 3)), KEY, temperature=jnp.ones(3))
    with pytest.raises(ValueError, match=r"only greedy draws need none"):
        sample(jnp.zeros((2, 3)), None)
    with pytest.raises(ValueError, match=r"accepted: 'mosaic_gpu', 'xla', None"):
        sample(jnp.zeros((2, 3)), KEY, implementation="scan")
    with pytest.raises(NotImplementedError) as error:
        sample(jnp.zeros((2, 3), jnp.float16), KEY, implementation="mosaic_gpu")
    for reason in ("the device is 'cpu'", "dtype float16; accepted: bfloat16, float32", "vocabulary of 3"):
        assert reason in str(error.value)

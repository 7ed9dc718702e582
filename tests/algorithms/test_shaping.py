"""From scores to rewards of tokens to advantages, against loops written from the papers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rapidfire_jax.algorithms import tasks
from rapidfire_jax.algorithms.reward_shaping import (
    init_stats,
    normalize_scores,
    overlong_fraction,
    shape_scores,
    token_rewards,
)
from tests.algorithms.bigram import ONLINE, QUICKLY, T, arrays, config_of, hparams_of, plain, rollouts_of, targets_of
from tests.helpers import oracles
from tests.helpers.tolerances import F32

normalized = jax.jit(normalize_scores, static_argnums=2)


def as_float64(rollouts):
    return jax.tree.map(lambda x: np.float64(x) if np.asarray(x).dtype == np.float32 else x, rollouts)


@pytest.mark.parametrize("sizes", [(6, 6, 6), (1, 1, 5), (2, 7, 1)])
@pytest.mark.parametrize("how", ["running", "reference", "none"])
def test_normalisation_over_batches(how, sizes):
    rng = np.random.default_rng(1)
    batches = [(20 * i + 3 * rng.normal(size=size)).astype(np.float32) for i, size in enumerate(sizes)]
    stats = init_stats()
    for batch, expected in zip(batches, oracles.normalize(batches, how), strict=True):
        ours, stats = normalized(batch, stats, how)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    seen = np.concatenate(
        {"running": batches, "reference": oracles.reference_batches(batches), "none": [np.zeros(0)]}[how]
    )
    assert stats.score_count == len(seen)
    if len(seen):
        np.testing.assert_allclose(stats.score_mean, seen.mean(), rtol=1e-5)
        np.testing.assert_allclose(stats.score_m2, ((seen - seen.mean()) ** 2).sum(), rtol=1e-4, atol=1e-4)


def test_a_first_batch_of_equal_scores_does_not_set_the_scale():
    stats = init_stats()
    first, stats = normalized(np.zeros(4, np.float32), stats, "reference")
    second, _ = normalized(np.float32([0, 1, 1, 0]), stats, "reference")
    np.testing.assert_array_equal(first, np.zeros(4))
    assert np.abs(second).max() < 3


def test_normalisation_far_from_zero():
    """Where the mean of the squares less the square of the mean would have no digit left."""
    rng = np.random.default_rng(2)
    batches = [(1e4 + rng.normal(size=64)).astype(np.float32) for _ in range(4)]
    stats = init_stats()
    for batch, expected in zip(batches, oracles.normalize(batches, "running"), strict=True):
        ours, stats = normalized(batch, stats, "running")
        np.testing.assert_allclose(ours, expected, atol=5e-3)  # a score of 1e4 has an error of 1e-3 of its own


@pytest.mark.parametrize("buffer", [0.0, 1.0, 3.0, 8.0])
def test_overlong_penalty(buffer):
    limit = 8
    lengths = np.arange(limit + 1)
    ours = jax.jit(overlong_fraction, static_argnums=1)(np.float32(lengths), limit, np.float32(buffer))
    expected = [oracles.overlong(n, limit, buffer) if buffer else float(n == limit) for n in lengths]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert ours[-1] == 1, "at full length all of it is subtracted"


@pytest.mark.parametrize("clip", [None, 0.7])
def test_scores_of_responses(clip):
    score, ended = np.float32([0.37, -1.6, 1e6, -1e6, 0.0, 2.5]), np.array([1, 0, 1, 0, 1, 0], bool)
    length = [1, 8, 5, 7, 6, 0]
    hparams = hparams_of("ppo", reward_clip=clip)
    shaped = jax.jit(lambda score, h: shape_scores(score, ended, np.float32(length), 8, h))
    expected = oracles.response_rewards(np.float64(score), ended, length, 8, hparams)
    np.testing.assert_allclose(shaped(score, arrays(hparams)), expected, rtol=1e-6)


SHAPINGS = {
    "k1 in the reward": {},
    "k3 in the reward": {"kl_estimator": "k3"},
    "k2 in the reward, running": {"kl_estimator": "k2", "reward_normalization": "running"},
    "abs in the reward, reference": {"kl_estimator": "abs", "reward_normalization": "reference"},
    "in the loss": {"kl_in": "loss", "kl_estimator": "k3"},
}


@functools.cache
def rewards(**changes):
    def run(rollouts, hparams):
        return token_rewards(rollouts, init_stats(), hparams, config_of("ppo", **changes))

    return jax.jit(run, compiler_options=QUICKLY)


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_rewards_of_tokens(shaping, rich):
    hparams = hparams_of("ppo") if rich else plain("ppo")
    rollouts = rollouts_of(1, **({} if rich else {"token_reward_t": None}))
    config = config_of("ppo", **{"kl_in": "reward", "kl_estimator": "k1"} | SHAPINGS[shaping])
    ours, metrics, _ = rewards(**SHAPINGS[shaping])(rollouts, arrays(hparams))
    exact = as_float64(rollouts)
    theirs = oracles.token_rewards(exact, hparams, config)
    np.testing.assert_allclose(ours, theirs, **F32)
    mask = rollouts.mask_t
    kls = [
        [oracles.kl(config.kl_estimator.removesuffix("+"), p, r) for p, r, m in zip(*row, strict=True) if m]
        for row in zip(exact.old_logp_t, exact.ref_logp_t, mask, strict=True)
    ]
    extra = np.where(mask, exact.token_reward_t, 0).sum(axis=1) if rich else 0.0
    expected = {
        "reward": (exact.score + extra).mean(),
        "kl": np.mean([sum(row) for row in kls]),
        "response_length": mask.sum(axis=1).mean(),
        "ended": rollouts.ended.mean(),
        "objective/shaped_reward": theirs.sum(axis=1).mean(),
    }
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, **F32, err_msg=key)


TARGETS = {
    "ppo": [{}, {"whiten_advantages": False, "bootstrap_truncated": True}, {"whiten_rewards": True, "kl_in": "loss"}],
    "grpo": [{}, {"scale": "none", "kl_in": "reward"}, {"group_size": 2, "reward_normalization": "running"}],
    "rloo": [{}, {"group_size": 2, "kl_in": "loss"}],
    "reinforce_pp": [{}, {"group_size": 1}, {"group_size": 2, "kl_in": "loss"}],
}


@pytest.mark.parametrize(
    ("name", "changes"), [(name, changes) for name, several in TARGETS.items() for changes in several]
)
def test_targets(name, changes):
    hparams, config, rollouts = hparams_of(name), config_of(name, **changes), rollouts_of(2)
    batch, metrics, _ = targets_of(name, rollouts, hparams, config)
    exact = as_float64(rollouts)
    adv, target = oracles.advantages(name, exact, hparams, config)
    np.testing.assert_allclose(batch.adv_t, adv, rtol=1e-4, atol=2e-5)  # a division by the deviation of few tokens
    if name == "ppo":
        np.testing.assert_allclose(batch.return_t, target, **F32)
        returned, v = target[rollouts.mask_t], exact.old_v_t[rollouts.mask_t]
        explained = 1 - (returned - v).var(ddof=1) / returned.var(ddof=1)
        np.testing.assert_allclose(metrics["value/explained_variance"], explained, rtol=1e-4)
        np.testing.assert_allclose(metrics["value/mean"], v.mean(), **F32)
    if name == "grpo":
        assert metrics["objective/informative"] == 1
    assert (batch.ref_logp_t is None) == (config.kl_in == "reward")
    np.testing.assert_array_equal(batch.importance_t, rollouts.importance_t)
    np.testing.assert_array_equal(batch.old_logp_t, rollouts.old_logp_t)


def test_share_of_informative_prompts():
    score = np.float32([1, 1, 1, 0, 1, 0])
    rollouts = rollouts_of(3, score=score, token_reward_t=None)
    batch, metrics, _ = targets_of("grpo", rollouts, plain("grpo"), config_of("grpo"))
    assert metrics["objective/informative"] == 0.5
    assert (np.asarray(batch.adv_t)[:3] == 0).all()


def test_bootstrapping_needs_a_value():
    rollouts = dataclasses.replace(rollouts_of(), next_v=None)
    config = config_of("ppo", bootstrap_truncated=True)
    with pytest.raises(ValueError, match=r"rollouts\.next_v"):
        tasks()["ppo"].targets(rollouts, None, init_stats(), plain("ppo"), config)


@pytest.mark.parametrize("name", ONLINE)
def test_targets_read_nothing_where_the_mask_is_false(name):
    config = config_of(name, kl_in="loss", kl_estimator="k3")
    if name == "ppo":
        config = dataclasses.replace(config, bootstrap_truncated=True, whiten_rewards=True)
    rollouts, hparams = rollouts_of(4), hparams_of(name)
    clean, *rest = targets_of(name, rollouts, hparams, config)
    for poison in (np.nan, np.inf, 1e30):
        per_token = ("old_logp_t", "old_v_t", "ref_logp_t", "token_reward_t", "importance_t")
        dirty = {key: np.where(rollouts.mask_t, getattr(rollouts, key), np.float32(poison)) for key in per_token}
        dirty["next_v"] = np.where(rollouts.ended, np.float32(poison), rollouts.next_v)
        batch, *others = targets_of(name, dataclasses.replace(rollouts, **dirty), hparams, config)
        np.testing.assert_array_equal(batch.adv_t, clean.adv_t)
        if name == "ppo":
            np.testing.assert_array_equal(batch.return_t, clean.return_t)
        jax.tree.map(np.testing.assert_array_equal, others, rest)
    assert clean.adv_t.shape == (6, T)

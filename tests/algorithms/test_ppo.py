"""PPO's losses and targets against NumPy, and what the steps promise."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidfire_jax import (
    PPOBatch,
    PPOConfig,
    PPOHParams,
    Rollouts,
    init_state,
    kl_estimate,
    make_optimizer,
    ppo_iteration,
    ppo_learn,
    ppo_loss,
    ppo_step,
    ppo_targets,
    ppo_update,
)
from rapidfire_jax.algorithms.masking import masked_mean, masked_variance, whiten
from tests.algorithms.test_advantages import gae_loop
from tests.helpers.compilations import compilations
from tests.helpers.tolerances import F32

B, P, T, V = 6, 3, 5, 11
HPARAMS = jax.tree.map(jnp.float32, PPOHParams(learning_rate=1e-2, kl_coef=0.1, temperature=0.8))
CONFIG = PPOConfig(epochs=2, minibatches=3)


class Out(NamedTuple):
    logp_t: jax.Array
    entropy_t: jax.Array
    v_t: jax.Array


def encode(frozen, tokens, attention_mask):
    return tokens


def bigram(frozen, trainable, tokens, length, temperature):
    """The smallest language model: a table of next-token logits, and a value a token."""
    logps = jax.nn.log_softmax((frozen["logits"] + trainable["logits"])[tokens[:, -length - 1 : -1]] / temperature)
    logp_t = jnp.take_along_axis(logps, tokens[:, -length:, None], -1)[..., 0]
    return Out(logp_t, -(jnp.exp(logps) * logps).sum(-1), trainable["values"][tokens[:, -length - 1 : -1]])


def bigram_reference(frozen, tokens, length, temperature):
    zeros = {"logits": jnp.zeros((V, V)), "values": jnp.zeros((V,))}
    return bigram(frozen, zeros, tokens, length, temperature).logp_t


def sample(frozen, trainable, prompts, prompt_mask, key, temperature):
    tokens = jnp.concatenate([prompts, jax.random.randint(key, (prompts.shape[0], T), 0, V)], axis=1)
    lengths = jax.random.randint(key, (prompts.shape[0],), 1, T + 1)
    mask_t = jnp.arange(T)[None] < lengths[:, None]
    mask = jnp.concatenate([prompt_mask, mask_t], axis=1)
    out = bigram(frozen, trainable, tokens, T, temperature)
    return Rollouts(tokens, mask, mask_t, lengths < T, out.logp_t, out.v_t)


def make(optimizer=None, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    frozen = {"logits": jax.random.normal(keys[0], (V, V))}
    trainable = {"logits": 0.1 * jax.random.normal(keys[1], (V, V)), "values": jax.random.normal(keys[2], (V,))}
    optimizer = optimizer or make_optimizer("adamw", max_grad_norm=1.0)
    prompts = jax.random.randint(keys[0], (B, P), 0, V), jnp.ones((B, P), bool)
    state = init_state(frozen, trainable, optimizer)
    rollouts = sample(frozen, trainable, *prompts, keys[1], HPARAMS.temperature)
    reference = bigram_reference(frozen, rollouts.tokens, T, HPARAMS.temperature)
    score = jax.random.normal(keys[2], (B,))
    return state, dataclasses.replace(rollouts, ref_logp_t=reference, score=score), optimizer, prompts


def test_targets_agree_with_numpy():
    _, rollouts, _, _ = make()
    hparams = dataclasses.replace(HPARAMS, reward_clip=jnp.float32(0.5), missing_eos_penalty=jnp.float32(0.25))
    batch, metrics = ppo_targets(rollouts, rollouts.tokens, hparams, PPOConfig())
    r = jax.tree.map(lambda x: np.asarray(x, np.float64), rollouts)
    rewards = np.zeros((B, T))
    for b in range(B):
        length = int(r.mask_t[b].sum())
        for t in range(length):
            rewards[b, t] = -0.1 * (r.old_logp_t[b, t] - r.ref_logp_t[b, t])
        rewards[b, length - 1] += np.clip(r.score[b], -0.5, 0.5) - (0.0 if r.ended[b] else 0.25)
    mask = np.asarray(rollouts.mask_t)
    adv = gae_loop(rewards, r.old_v_t, mask, 1.0, 0.95)
    np.testing.assert_allclose(batch.return_t, np.where(mask, adv + r.old_v_t, 0), **F32)
    white = np.where(mask, (adv - adv[mask].mean()) / np.sqrt(adv[mask].var(ddof=1) + 1e-8), 0)
    np.testing.assert_allclose(batch.adv_t, white, **F32)
    np.testing.assert_allclose(metrics["objective/shaped_reward"], rewards.sum(1).mean(), **F32)
    returns = (adv + r.old_v_t)[mask]
    variance = 1 - (returns - r.old_v_t[mask]).var(ddof=1) / returns.var(ddof=1)
    np.testing.assert_allclose(metrics["value/explained_variance"], variance, **F32)


def random_batch(seed):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.normal(size=(B, T)).astype(np.float32)  # noqa: E731
    batch = PPOBatch(np.zeros((B, P + T), np.int32), rng.random((B, T)) < 0.6, *(draw() for _ in range(4)))
    return batch, draw(), abs(draw()), draw()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_loss_agrees_with_a_loop(seed):
    batch, logp, entropy, v = random_batch(seed)
    h = PPOHParams(clip_range=0.2, value_clip_range=0.3, value_coef=0.5, entropy_coef=0.01)
    total = count = 0.0
    for b in range(B):
        for t in range(T):
            if batch.mask_t[b, t]:
                ratio = np.exp(float(logp[b, t]) - batch.old_logp_t[b, t])
                adv = batch.adv_t[b, t]
                total += -min(ratio * adv, min(max(ratio, 0.8), 1.2) * adv)
                old, target = batch.old_v_t[b, t], batch.return_t[b, t]
                near = min(max(v[b, t], old - 0.3), old + 0.3)
                total += 0.5 * 0.5 * max((v[b, t] - target) ** 2, (near - target) ** 2) - 0.01 * entropy[b, t]
                count += 1
    ours, n, _ = ppo_loss(*map(jnp.asarray, (logp, entropy, v)), jax.tree.map(jnp.asarray, batch), h)
    assert n == count
    np.testing.assert_allclose(ours, total, rtol=1e-4, atol=1e-4)


def test_masked_positions_get_exactly_zero_gradient_even_with_nan():
    batch, logp, entropy, v = jax.tree.map(jnp.asarray, random_batch(3))
    poisoned = [jnp.where(batch.mask_t, x, jnp.nan) for x in (logp, entropy, v)]
    h = PPOHParams(entropy_coef=0.1)
    gradients = jax.grad(lambda *x: ppo_loss(*x, batch, h)[0], argnums=(0, 1))(*poisoned)
    clean = jax.grad(lambda *x: ppo_loss(*x, batch, h)[0], argnums=(0, 1))(logp, entropy, v)
    for dirty, expected in zip(gradients, clean, strict=True):
        assert (np.asarray(dirty)[~np.asarray(batch.mask_t)] == 0).all()
        np.testing.assert_array_equal(dirty, expected)


def test_loss_of_an_empty_mask_is_zero_and_finite():
    batch, logp, entropy, v = jax.tree.map(jnp.asarray, random_batch(4))
    batch = dataclasses.replace(batch, mask_t=jnp.zeros((B, T), bool))
    total, count, metrics = ppo_loss(logp, entropy, v, batch, PPOHParams())
    assert total == 0 and count == 0 and all(np.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize("score", [0.37, -1.6, 1e6])
def test_scores_keep_their_fractions(score):
    _, rollouts, _, _ = make()
    rollouts = dataclasses.replace(rollouts, score=jnp.full((B,), score), old_v_t=jnp.zeros((B, T)))
    hparams = dataclasses.replace(HPARAMS, kl_coef=jnp.float32(0.0), lam=jnp.float32(1.0))
    batch, _ = ppo_targets(rollouts, rollouts.tokens, hparams, PPOConfig())
    np.testing.assert_allclose(batch.return_t, np.where(rollouts.mask_t, np.float32(score), 0))


def test_first_ratio_is_one_and_kl_to_itself_is_zero():
    state, rollouts, optimizer, _ = make()
    rollouts = dataclasses.replace(rollouts, ref_logp_t=rollouts.old_logp_t)
    learner = {"apply": bigram, "encode": encode, "optimizer": optimizer, "config": CONFIG}
    _, metrics = ppo_update(state, rollouts, HPARAMS, jax.random.key(0), **learner)
    assert metrics["policy/ratio_first"] <= 1e-5
    assert metrics["kl"] == 0
    for estimator in ("k1", "k3"):
        assert (kl_estimate(rollouts.old_logp_t, rollouts.old_logp_t, estimator) == 0).all()


def test_kl_estimators_agree_with_their_expectation():
    p, q = (jax.nn.log_softmax(jax.random.normal(jax.random.key(i), (V,))) for i in (0, 1))
    exact = float((jnp.exp(p) * (p - q)).sum())
    for estimator in ("k1", "k3"):
        mean = float((jnp.exp(p) * kl_estimate(p, q, estimator)).sum())
        assert mean == pytest.approx(exact, abs=1e-5)
    assert (kl_estimate(p, q, "k3") >= 0).all()
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(p, q, "k9")


def test_step_is_plain_sgd_on_the_mean_loss():
    state, rollouts, _, _ = make(optax.sgd(0.1))
    batch, _ = ppo_targets(rollouts, rollouts.tokens, HPARAMS, CONFIG)

    def mean_loss(trainable):
        out = bigram(state.frozen, trainable, batch.inputs, T, HPARAMS.temperature)
        total, count, _ = ppo_loss(*out, batch, HPARAMS)
        return total / count

    expected = jax.tree.map(lambda w, g: w - 0.1 * g, state.trainable, jax.grad(mean_loss)(state.trainable))
    new, _ = ppo_step(state, batch, HPARAMS, apply=bigram, optimizer=optax.sgd(0.1), config=CONFIG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new.trainable, expected)
    assert new.step == 1
    jax.tree.map(np.testing.assert_array_equal, new.frozen, state.frozen)


def test_learning_rate_is_followed_and_compiles_nothing_new():
    state, rollouts, optimizer, prompts = make()
    batch, _ = ppo_targets(rollouts, rollouts.tokens, HPARAMS, CONFIG)
    key = jax.random.key(0)
    common = {"apply": bigram, "optimizer": optimizer, "config": CONFIG}
    updating = common | {"encode": encode}
    learn = updating | {"reference": bigram_reference}
    whole = learn | {"sample": sample, "reward": lambda r: r.mask_t.sum(1).astype(jnp.float32)}
    step = jax.jit(lambda s, b, h: ppo_step(s, b, h, **common))
    update = jax.jit(lambda s, r, h: ppo_update(s, r, h, key, **updating))
    learning = jax.jit(lambda s, r, h: ppo_learn(s, r, h, key, **learn))
    iteration = jax.jit(lambda s, p, h: ppo_iteration(s, p, h, key, **whole))

    def everything(state, hparams):
        state, _ = step(state, batch, hparams)
        state, _ = update(state, rollouts, hparams)
        state, _ = learning(state, rollouts, hparams)
        return iteration(state, prompts, hparams)[0]

    state = everything(state, HPARAMS)
    changed = jax.tree.map(lambda x: x * 0.9, HPARAMS)
    with compilations() as found:
        state = everything(state, changed)
    assert not found
    frozen_rate = dataclasses.replace(HPARAMS, learning_rate=jnp.float32(0.0))
    still, _ = step(state, batch, frozen_rate)
    jax.tree.map(np.testing.assert_array_equal, still.trainable, state.trainable)


def test_iteration_is_sample_then_learn():
    state, _, optimizer, prompts = make()
    reward = lambda r: r.mask_t.sum(1).astype(jnp.float32)  # noqa: E731
    learn = {"apply": bigram, "reference": bigram_reference, "encode": encode, "optimizer": optimizer, "config": CONFIG}
    key = jax.random.key(5)
    one, _ = ppo_iteration(state, prompts, HPARAMS, key, sample=sample, reward=reward, **learn)
    sample_key, learn_key = jax.random.split(key)
    rollouts = sample(state.frozen, state.trainable, *prompts, sample_key, HPARAMS.temperature)
    rollouts = dataclasses.replace(rollouts, score=reward(rollouts))
    two, _ = ppo_learn(state, rollouts, HPARAMS, learn_key, **learn)
    jax.tree.map(np.testing.assert_array_equal, one.trainable, two.trainable)


def test_recompute_measures_the_mismatch():
    state, rollouts, optimizer, _ = make()
    shifted = dataclasses.replace(rollouts, old_logp_t=rollouts.old_logp_t + 0.25)
    learn = {"apply": bigram, "reference": bigram_reference, "encode": encode, "optimizer": optimizer}
    config = dataclasses.replace(CONFIG, recompute=True)
    _, metrics = ppo_learn(state, shifted, HPARAMS, jax.random.key(0), **learn, config=config)
    np.testing.assert_allclose(metrics["policy/rollout_mismatch"], 0.25, rtol=1e-5)
    assert metrics["policy/ratio_first"] <= 1e-5


def test_rows_that_cannot_be_cut():
    state, rollouts, optimizer, _ = make()
    learner = {"apply": bigram, "encode": encode, "optimizer": optimizer, "config": PPOConfig(minibatches=4)}
    with pytest.raises(ValueError, match="6 rollouts"):
        ppo_update(state, rollouts, HPARAMS, jax.random.key(0), **learner)


def test_sweep_by_vmap():
    state, rollouts, optimizer, _ = make()
    rates = jnp.array([0.0, 1e-2])
    hparams = jax.vmap(lambda rate: dataclasses.replace(HPARAMS, learning_rate=rate))(rates)

    def run(hparams):
        learner = {"apply": bigram, "encode": encode, "optimizer": optimizer, "config": CONFIG}
        return ppo_update(state, rollouts, hparams, jax.random.key(0), **learner)[0].trainable

    both = jax.vmap(run)(hparams)
    single = run(HPARAMS)
    jax.tree.map(lambda b, s: np.testing.assert_allclose(b[1], s, **F32), both, single)
    jax.tree.map(lambda b, s: np.testing.assert_array_equal(b[0], s), both, state.trainable)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_masked_statistics(seed):
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(size=(4, 7)).astype(np.float32) * 3 + 1, rng.random((4, 7)) < 0.5
    if mask.sum() < 2:
        return
    np.testing.assert_allclose(masked_mean(jnp.asarray(x), jnp.asarray(mask)), x[mask].mean(), **F32)
    np.testing.assert_allclose(masked_variance(jnp.asarray(x), jnp.asarray(mask)), x[mask].var(ddof=1), **F32)
    white = np.asarray(whiten(jnp.asarray(x), jnp.asarray(mask)))
    assert (white[~mask] == 0).all()
    np.testing.assert_allclose(white[mask].mean(), 0, atol=1e-5)

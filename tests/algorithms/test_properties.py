"""What a step must not depend on: padding, the order of rows, micro-batches, and what stands where a mask is False."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidfire_jax import make_optimizer
from rapidfire_jax.algorithms import tasks
from rapidfire_jax.algorithms.masking import finish
from rapidfire_jax.algorithms.offline import evaluate
from tests.algorithms.bigram import (
    OFFLINE,
    OFFLINE_CASES,
    ONLINE,
    POLICY,
    QUICKLY,
    SCORER,
    TEMPERATURE,
    V,
    arrays,
    compiled,
    config_of,
    hparams_of,
    offline_batch,
    plain,
    rollouts_of,
    same,
    state_of,
    targets_of,
    update,
)

EXACT = {"rtol": 1e-5, "atol": 1e-6}
SEEDS = st.integers(0, 10_000)
PER_TOKEN = ("old_logp_t", "old_v_t", "ref_logp_t", "token_reward_t", "importance_t")


@functools.cache
def rich(name):
    """As much as an algorithm can do in one step, and what a number of it depends on."""
    of_ppo = {"whiten_rewards": True, "bootstrap_truncated": True} if name == "ppo" else {}
    in_loss = {"kl_in": "loss", "kl_estimator": "k3"} if name in ("ppo", "grpo") else {"kl_in": "reward"}
    # The penalty of length is relative to the width, which these tests change; a limit on the KL ends a step.
    hparams = hparams_of(name, overlong_penalty=0.0, target_kl=None)
    return hparams, config_of(name, reward_normalization="running", **in_loss, **of_ppo)


def padded(rollouts, left=2, right=3, junk=np.nan):
    """More padding on both sides, with `junk` in it."""
    sides = {"tokens": (left, right), "attention_mask": (left, right), "mask_t": (0, right)}
    sides |= dict.fromkeys(PER_TOKEN, (0, right))

    def pad(name):
        x = getattr(rollouts, name)
        fill = {"f": junk, "i": V - 1, "b": False}[x.dtype.kind]
        return np.pad(x, ((0, 0), sides[name]), constant_values=fill)

    return dataclasses.replace(rollouts, **{name: pad(name) for name in sides})


@pytest.mark.parametrize("name", ONLINE)
def test_an_update_depends_on_nothing_but_its_tokens(name):
    hparams, config = rich(name)
    rollouts = rollouts_of(21)
    expected = update(name, rollouts, hparams, config)
    batch, objective, _ = targets_of(name, rollouts, hparams, config)
    by_step = compiled(name, "step", config)(state_of(), batch, arrays(hparams))
    same(expected[0].trainable, by_step[0].trainable, **EXACT)
    same({key: expected[1][key] for key in (objective | by_step[1])}, objective | by_step[1], **EXACT)
    for junk in (np.nan, 1e30):
        same(update(name, padded(rollouts, junk=junk), hparams, config), expected, **EXACT)
    for junk in (np.nan, np.inf, -np.inf, 1e30):
        dirty = {key: np.where(rollouts.mask_t, getattr(rollouts, key), np.float32(junk)) for key in PER_TOKEN}
        tokens = np.where(rollouts.attention_mask, rollouts.tokens, 1)
        same(update(name, dataclasses.replace(rollouts, tokens=tokens, **dirty), hparams, config), expected)


@settings(deadline=None, max_examples=6)
@given(SEEDS)
def test_an_update_does_not_depend_on_the_order_of_rows(seed):
    rng = np.random.default_rng(seed)
    order = np.concatenate([3 * group + rng.permutation(3) for group in rng.permutation(2)])
    rollouts = rollouts_of(seed)
    for name in ONLINE:
        hparams, config = rich(name)
        moved = jax.tree.map(lambda x: x[order], rollouts)
        state, metrics = update(name, moved, hparams, config, seed=seed)
        expected, unmoved = update(name, rollouts, hparams, config)
        same(state, expected, rtol=1e-4, atol=2e-6)
        same(metrics, unmoved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ONLINE)
def test_a_step_does_not_depend_on_micro_batches(name):
    hparams, config = rich(name)
    batch, *_ = targets_of(name, rollouts_of(22, lengths=(5, 5, 1, 0, 3, 2)), hparams, config)
    expected = compiled(name, "step", config)(state_of(), batch, arrays(hparams))
    for parts in (2, 3, 6) if name in ("ppo", "grpo") else (3,):
        cut = dataclasses.replace(config, micro_batches=parts)
        same(compiled(name, "step", cut)(state_of(), batch, arrays(hparams)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), OFFLINE_CASES)
def test_an_offline_step_depends_on_neither_micro_batches_nor_order_nor_padding(name, kind):
    batch, hparams, config = offline_batch(name, kind), arrays(tasks()[name].hparams(**OFFLINE[name])), None
    hparams = dataclasses.replace(hparams, learning_rate=np.float32(0.5))
    config = tasks()[name].config()
    one = compiled(name, "step", config)
    expected = one(state_of(), batch, hparams)
    assert np.any(expected[0].trainable["values" if name == "reward_model" else "logits"] != 0)
    for parts in (2, 3, 6) if name == "sft" else (3,):
        cut = dataclasses.replace(config, micro_batches=parts)
        same(compiled(name, "step", cut)(state_of(), batch, hparams), expected, **EXACT)
    order = np.random.default_rng(0).permutation(6)
    same(one(state_of(), jax.tree.map(lambda x: x[order], batch), hparams), expected, **EXACT)
    left, right = (0, 3) if name == "sft" else (2, 3)
    widths = {"mask_t": (0, right), "label": None, "margin": None}

    def pad(field):
        x = getattr(batch, field.name)
        sides = widths.get(field.name, (left, right))
        return x if sides is None else np.pad(x, [(0, 0)] * (x.ndim - 1) + [sides])

    wider = type(batch)(**{field.name: pad(field) for field in dataclasses.fields(batch)})
    filled = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), wider)  # rows without tokens do not count
    same(one(state_of(), filled, hparams), expected, **EXACT)


@pytest.mark.parametrize(("name", "kind"), OFFLINE_CASES)
def test_evaluation_is_the_metrics_of_a_step(name, kind):
    batch, hparams, config = offline_batch(name, kind), tasks()[name].hparams(**OFFLINE[name]), tasks()[name].config()
    model = SCORER if name == "reward_model" else POLICY
    half = [jax.tree.map(lambda x, s=part: x[s], batch) for part in (slice(0, 3), slice(3, 6))]
    run = jax.jit(lambda state, b: evaluate(tasks()[name], state, b, hparams, model=model, config=config))
    together = finish(jax.tree.map(lambda a, b: jnp.stack([a, b]), *(run(state_of(), part) for part in half)))
    _, metrics = compiled(name, "step", config)(state_of(), batch, arrays(hparams))
    assert together.pop("loss") == pytest.approx(float(metrics["loss/total"]), rel=1e-5)
    for key, value in together.items():
        np.testing.assert_allclose(value, metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)


@settings(deadline=None, max_examples=6)
@given(SEEDS)
def test_a_policy_against_itself(seed):
    """Its ratio is 1 and its KL 0, whatever the rewards."""
    rollouts = rollouts_of(seed, noise=0.0)
    rollouts = dataclasses.replace(rollouts, ref_logp_t=rollouts.old_logp_t)
    for name in ONLINE:
        hparams, config = rich(name)
        _, metrics = update(name, rollouts, hparams, config)
        assert metrics["kl"] == 0
        assert metrics["policy/ratio_first"] < 1e-5 and metrics["policy/approx_kl"] < 1e-9
        assert metrics["policy/clip_fraction"] == 0


@settings(deadline=None, max_examples=6)
@given(SEEDS)
def test_the_first_step_is_reinforce(seed):
    """By the policy's parameters: rate times the mean of advantage times the gradient of the log-probability."""
    rollouts = rollouts_of(seed, noise=0.0, token_reward_t=None, importance_t=None)
    for name in ONLINE:
        of_ppo = {"value_coef": 0.0} if name == "ppo" else {}
        hparams, config = plain(name, kl_coef=0.0, learning_rate=1.0, **of_ppo), config_of(name)
        batch, *_ = targets_of(name, rollouts, hparams, config)
        moved = compiled(name, "step", config)(state_of(), batch, arrays(hparams))[0].trainable["logits"]
        expected = reinforce(name)(state_of(), batch)
        np.testing.assert_allclose(moved - state_of().trainable["logits"], expected, rtol=1e-3, atol=1e-5)


@functools.cache
def reinforce(name):
    def gradient(state, batch):
        def objective(logits):
            trainable = state.trainable | {"logits": logits}
            logp_t = POLICY.apply(state.frozen, trainable, batch.inputs, batch.mask_t.shape[1], TEMPERATURE).logp_t
            terms = jnp.where(batch.mask_t, batch.adv_t * logp_t, 0.0)
            if name in ("ppo", "reinforce_pp"):
                return terms.sum() / batch.mask_t.sum(dtype=terms.dtype)
            lengths = batch.mask_t.sum(axis=1, dtype=terms.dtype)
            per_response = terms.sum(axis=1)
            return (per_response / lengths if name == "grpo" else per_response).mean()

        return jax.grad(objective)(state.trainable["logits"])

    return jax.jit(gradient, compiler_options=QUICKLY)


SCORES = {
    "fractions": [0.37, -1.61, 0.5, 0.25, -0.125, 1e-3],
    "large": [1e6, -1e6, 1e6 + 0.5, 1e6, 1e6, 1e6],
    "alike": [0.1] * 6,
    "one of them": [0, 0, 0, 0, 0, 1e6],
    "nothing": [0] * 6,
}


@pytest.mark.parametrize(
    ("name", "normalization"), [*((name, "running") for name in ONLINE), ("ppo", "none"), ("reinforce_pp", "none")]
)
def test_everything_stays_finite(name, normalization):
    hparams, config = rich(name)
    hparams = dataclasses.replace(hparams, reward_clip=1e9)
    config = dataclasses.replace(config, reward_normalization=normalization)
    for lengths in ((2, 5, 1, 4, 3, 5), (0, 5, 1, 0, 3, 5), (0,), (0, 0, 0, 0, 0, 1)):
        for score in SCORES.values():
            rollouts = rollouts_of(23, lengths=lengths, score=np.float32(score))
            state, metrics = update(name, rollouts, hparams, config)
            for path, x in jax.tree_util.tree_leaves_with_path((state, metrics)):
                assert np.isfinite(x).all(), (jax.tree_util.keystr(path), lengths, score)
            if lengths == (0,):
                same(state.trainable, state_of().trainable)


def test_a_prompt_whose_responses_are_scored_alike_teaches_nothing():
    """However they are scored."""
    for name in ("grpo", "rloo"):
        config = config_of(name)
        hparams = plain(name, kl_coef=0.0)
        for score in (0.1, 33.3, 1000.1, 1e6 + 0.1):
            rollouts = rollouts_of(
                24, noise=0.0, score=np.full(6, score, np.float32), token_reward_t=None, importance_t=None
            )
            state, _ = update(name, rollouts, hparams, config)
            same(state.trainable, state_of().trainable)


def test_half_precision_weights():
    """Gradients of bfloat16 weights are added up in float32 over micro-batches."""
    hparams, config = rich("grpo")
    batch, *_ = targets_of("grpo", rollouts_of(25), hparams, config)
    state = state_of(make_optimizer("sgd"))
    state = dataclasses.replace(state, trainable=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.trainable))
    with jax.numpy_dtype_promotion("standard"):
        runs = [
            compiled("grpo", "step", dataclasses.replace(config, micro_batches=parts))(state, batch, arrays(hparams))
            for parts in (1, 6)
        ]
    for new, _ in runs:
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(new.trainable))
    (_, whole), (_, cut) = runs
    same(whole, cut, rtol=2e-2, atol=2e-3)

"""Whole steps and updates: done again by hand, ended early, with a critic of its own rate, without compiling anew."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rapidfire_jax import make_optimizer, separate_optimizers
from rapidfire_jax.algorithms import tasks
from rapidfire_jax.algorithms.optimizer import take_step
from rapidfire_jax.algorithms.reward_shaping import init_stats
from rapidfire_jax.algorithms.train_state import gradient_step
from rapidfire_jax.errors import InputError
from tests.algorithms.bigram import (
    OFFLINE,
    OFFLINE_CASES,
    ONLINE,
    arrays,
    by_hand,
    compiled,
    config_of,
    hparams_of,
    is_critic,
    offline_batch,
    plain,
    rollouts_of,
    same,
    state_of,
    targets_of,
    update,
    weights,
)
from tests.algorithms.test_shaping import as_float64
from tests.helpers import oracles
from tests.helpers.compilations import compilations

# What is averaged over an epoch of one step, and the settings that make an algorithm of each paper.
CASES = {
    "PPO": ("ppo", {}, {}),
    "PPO, everything": (
        "ppo",
        {"whiten_rewards": True, "bootstrap_truncated": True, "reward_normalization": "running"},
        None,
    ),
    "GRPO": ("grpo", {}, {}),
    "GRPO, everything": ("grpo", {"kl_in": "reward", "kl_estimator": "k1"}, None),
    "Dr. GRPO": ("grpo", {"scale": "none", "aggregation": "fixed"}, {"kl_coef": 0.0}),
    "DAPO": (
        "grpo",
        {"aggregation": "token"},
        {"clip_range_high": 0.28, "kl_coef": 0.0, "overlong_penalty": 1.0, "overlong_buffer": 2.0},
    ),
    "GSPO": ("grpo", {"ratio_level": "sequence"}, {"clip_range": 0.1, "clip_range_high": 0.15}),
    "RLOO": ("rloo", {}, {}),
    "RLOO, everything": ("rloo", {"kl_in": "loss", "kl_estimator": "k2"}, None),
    "REINFORCE++": ("reinforce_pp", {"group_size": 1}, {}),
    "REINFORCE++-baseline": ("reinforce_pp", {"kl_in": "loss", "kl_estimator": "k2"}, {"gamma": 0.9}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_by_hand(case):
    """Rewards, advantages, loss, its gradient by central differences and a step of plain SGD, all in NumPy."""
    name, changes, numbers = CASES[case]
    switched = {"target_kl": None, "critic_learning_rate": None}
    hparams = hparams_of(name, **switched) if numbers is None else plain(name, **numbers)
    config, rollouts = config_of(name, **changes), rollouts_of(11)
    rollouts = rollouts if numbers is None else dataclasses.replace(rollouts, token_reward_t=None, importance_t=None)
    batch, *_ = targets_of(name, rollouts, hparams, config)
    state, metrics = compiled(name, "step", config)(state_of(), batch, arrays(hparams))

    exact = as_float64(rollouts)
    adv, target = oracles.advantages(name, exact, hparams, config)
    batch = SimpleNamespace(**vars(exact), adv_t=adv, return_t=target)
    frozen, trainable = weights()

    def loss(**changed):
        outputs = by_hand(frozen, trainable | changed, rollouts.tokens)
        total, count = oracles.online_loss(name, *outputs, batch, hparams, config)
        return total / count

    np.testing.assert_allclose(metrics["loss/total"], loss(), rtol=1e-4, atol=1e-5)
    rate, norm = hparams.learning_rate, 0.0
    for key in ("logits", "values"):
        gradient = oracles.slope(lambda x, key=key: loss(**{key: x}), trainable[key])
        norm += (gradient**2).sum()
        expected = trainable[key] - rate * gradient
        np.testing.assert_allclose(state.trainable[key], expected, rtol=1e-5, atol=2e-6, err_msg=key)
    np.testing.assert_allclose(metrics["policy/gradient_norm"], np.sqrt(norm), rtol=1e-4)
    assert state.step == 1


def test_target_kl_ends_the_epochs():
    name = "ppo"  # for all algorithms there is one loop
    config = config_of(name, epochs=5)
    hparams = dataclasses.replace(plain(name), learning_rate=2.0)
    rollouts = rollouts_of(12, noise=0.0, token_reward_t=None, importance_t=None)
    one = compiled(name, "step", config)
    batch, *_ = targets_of(name, rollouts, hparams, config)
    states, kls, state = [], [], state_of()
    for _ in range(5):
        states.append(state)
        state, metrics = one(state, batch, arrays(hparams))
        kls.append(metrics["policy/approx_kl"])
    assert kls[0] < 1e-6 and np.all(np.diff(kls) > 0), "the test wants steps that lead away"
    for taken in (1, 3):
        target_kl = np.float32((kls[taken - 1] + kls[taken]) / 2)
        ended, metrics = update(name, rollouts, dataclasses.replace(hparams, target_kl=target_kl), config)
        assert metrics["policy/steps_taken"] == taken == ended.step
        same(ended.trainable, states[taken].trainable, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["policy/approx_kl"], np.mean(kls[:taken]), rtol=1e-3, atol=1e-6)
    ended, metrics = update(name, rollouts, dataclasses.replace(hparams, target_kl=np.float32(1e9)), config)
    assert metrics["policy/steps_taken"] == 5
    unlimited, means = update(name, rollouts, hparams, config)
    same(ended.trainable, unlimited.trainable, rtol=1e-5, atol=1e-6)
    del metrics["policy/steps_taken"]
    same(metrics, means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["together", "separate"])
def test_critic_warms_up_alone(optimizer):
    options = {"is_critic": is_critic, "weight_decay": 0.1}
    if optimizer == "separate":
        halves = (make_optimizer("adamw", **options) for _ in range(2))
        optimizer = separate_optimizers(*halves, is_critic)
    else:
        optimizer = make_optimizer("adamw", **options)
    rollouts, config = rollouts_of(13), config_of("ppo", epochs=3)
    before = state_of(optimizer)
    for warmup, still in ((3.0, True), (2.0, False), (0.0, False)):
        hparams = hparams_of("ppo", critic_warmup=warmup, target_kl=None)
        after, _ = update("ppo", rollouts, hparams, config, state_of(optimizer), optimizer=optimizer)
        assert np.array_equal(after.trainable["logits"], before.trainable["logits"]) == still
        assert not np.any(np.asarray(after.trainable["values"]) == before.trainable["values"])
        assert after.step == 3


def test_rates_of_policy_and_critic():
    """Each parameter moves by its own rate times its gradient."""
    together = make_optimizer("sgd", is_critic=is_critic)
    separate = separate_optimizers(together, make_optimizer("sgd", is_critic=is_critic), is_critic)
    rollouts, config, start = rollouts_of(14), config_of("ppo"), state_of()
    steps = {}
    for rates in ((0.1, None), (0.1, 0.3), (0.2, 0.0)):
        hparams = hparams_of("ppo", learning_rate=rates[0], critic_learning_rate=rates[1], target_kl=None)
        for optimizer in (together, separate) if rates[1] is not None else (together,):
            after, _ = update("ppo", rollouts, hparams, config, state_of(optimizer), optimizer=optimizer)
            moved = jax.tree.map(np.subtract, after.trainable, start.trainable)
            same(moved, steps.setdefault(rates, moved), atol=1e-7)
    for rates in ((0.1, 0.3), (0.2, 0.0)):
        for key, factor in (("logits", rates[0] / 0.1), ("values", rates[1] / 0.1)):
            np.testing.assert_allclose(steps[rates][key], factor * steps[0.1, None][key], rtol=1e-4, atol=1e-6)


def test_separate_optimizers_clip_their_own_gradients():
    clipped = lambda: make_optimizer("sgd", max_grad_norm=1e-3, is_critic=is_critic)  # noqa: E731
    rollouts, config = rollouts_of(15), config_of("ppo")
    hparams = hparams_of("ppo", learning_rate=1.0, critic_learning_rate=1.0, target_kl=None)
    for optimizer, each in ((clipped(), False), (separate_optimizers(clipped(), clipped(), is_critic), True)):
        after, _ = update("ppo", rollouts, hparams, config, state_of(optimizer), optimizer=optimizer)
        moved = jax.tree.map(np.subtract, after.trainable, state_of().trainable)
        norms = np.array([np.linalg.norm(moved["logits"]), np.linalg.norm(moved["values"])])
        np.testing.assert_allclose(norms if each else np.linalg.norm(norms), 1e-3, rtol=1e-3)


def test_importance_of_the_sampler():
    """Tokens are weighted by the recomputed over the sampler's probability, at most the cap."""
    name = "ppo"
    rollouts = rollouts_of(16, noise=0.4, importance_t=None)
    hparams = plain(name, importance_cap=1.15)
    config = config_of(name, recompute=True)
    key = jax.random.key(0)
    state, metrics = compiled(name, "learn", config)(state_of(), rollouts, arrays(hparams), key)
    frozen, trainable = weights()
    logp, _, v = (np.float32(x) for x in by_hand(frozen, trainable, rollouts.tokens))
    mask = rollouts.mask_t
    weight = np.minimum(np.exp(logp - rollouts.old_logp_t), np.float32(1.15))
    assert 0.2 < (weight[mask] == np.float32(1.15)).mean() < 0.8
    np.testing.assert_allclose(metrics["policy/importance"], weight[mask].mean(), rtol=1e-5)
    mismatch = abs(logp - rollouts.old_logp_t)[mask].mean()
    np.testing.assert_allclose(metrics["policy/rollout_mismatch"], mismatch, rtol=1e-5)
    again = dataclasses.replace(rollouts, old_logp_t=logp, old_v_t=v, importance_t=weight)
    expected, _ = update(name, again, hparams, config_of(name))
    same(state.trainable, expected.trainable, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs recompute=True"):
        compiled(name, "learn", config_of(name))(state_of(), rollouts, arrays(hparams), key)


def test_kl_coefficient_follows_its_target():
    """Over iterations: scaled by Ziegler's factor of the KL of each, and used from the next one on."""
    name = "reinforce_pp"
    config = config_of(name, kl_in="reward")
    hparams = plain(name, kl_coef=0.2, kl_target=1.0, kl_horizon=60.0)
    rollouts, state, scale = rollouts_of(17, token_reward_t=None, importance_t=None), state_of(), 1.0
    for _ in range(3):
        without = dataclasses.replace(state, stats=init_stats())
        fixed, shaped = update(name, rollouts, plain(name, kl_coef=0.2 * scale), config, without)
        state, metrics = update(name, rollouts, hparams, config, state)
        same(state.trainable, fixed.trainable, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["objective/kl_coef"], 0.2 * scale, rtol=1e-5)
        np.testing.assert_allclose(metrics["objective/shaped_reward"], shaped["objective/shaped_reward"], rtol=1e-5)
        scale *= 1 + min(max(float(metrics["kl"]) - 1, -0.2), 0.2) * 6 / 60
        np.testing.assert_allclose(state.stats.kl_scale, scale, rtol=1e-5)


def test_scores_are_normalised_over_the_run():
    config = config_of("ppo", reward_normalization="running")
    state, batches = state_of(), [rollouts_of(seed, token_reward_t=None, importance_t=None) for seed in (1, 2, 3)]
    hparams = plain("ppo", kl_coef=0.0)
    for rollouts, expected in zip(batches, oracles.normalize([b.score for b in batches], "running"), strict=True):
        state, metrics = update("ppo", rollouts, hparams, config, state)
        np.testing.assert_allclose(metrics["objective/shaped_reward"], expected.mean(), rtol=1e-4, atol=1e-5)
    assert state.stats.score_count == 18


def test_a_step_without_any_token_moves_nothing():
    def loss(trainable, batch):
        return trainable["w"].sum() * batch.sum(), batch.sum(), {}

    state = dataclasses.replace(state_of(), trainable={"w": np.ones(3, np.float32)})
    step = jax.jit(lambda s, b: gradient_step(s, b, loss, optimizer=optax.sgd(1.0), rates={}))
    new, metrics = step(
        dataclasses.replace(state, opt_state=optax.sgd(1.0).init(state.trainable)), np.zeros(2, np.float32)
    )
    np.testing.assert_array_equal(new.trainable["w"], np.ones(3))
    assert metrics["loss/total"] == 0 and metrics["policy/gradient_norm"] == 0


def test_rows_that_cannot_be_cut_into_micro_batches():
    config = config_of("grpo", micro_batches=4)
    with pytest.raises(ValueError, match="6 rows cannot be cut into 4"):
        update("grpo", rollouts_of(), plain("grpo"), config)


def numbers_of(hparams):
    return [field.name for field in dataclasses.fields(hparams) if getattr(hparams, field.name) is not None]


# What each number is changed to; by a tenth where nothing is said.
OTHERWISE = {"target_kl": 1e-9, "critic_warmup": 5.0, "overlong_buffer": 3.0, "kl_target": 1e-3, "reward_clip": 0.5}


@pytest.mark.parametrize("name", ONLINE)
def test_changing_a_number_of_an_online_algorithm_compiles_nothing_and_has_an_effect(name):
    optimizer = make_optimizer("sgd", is_critic=is_critic)
    config = config_of(name, epochs=2, kl_in="loss", kl_estimator="k2", recompute=True)
    rollouts = rollouts_of(19, noise=0.6, importance_t=None)
    rollouts = dataclasses.replace(rollouts, score=3 * rollouts.score)
    hparams = hparams_of(name, learning_rate=1.0, target_kl=5.0)
    learn, one = (compiled(name, what, config, optimizer) for what in ("learn", "step"))
    batch, *_ = targets_of(
        name, dataclasses.replace(rollouts, importance_t=rollouts_of(19).importance_t), hparams, config
    )
    state, key = state_of(optimizer), jax.random.key(1)

    def everything(hparams):
        hparams = arrays(hparams)
        return learn(state, rollouts, hparams, key), one(state, batch, hparams)  # an update is most of learning

    before = jax.tree.leaves(jax.device_get(everything(hparams)))
    assert len(numbers_of(hparams)) == len(dataclasses.fields(hparams)), "a number is switched off"
    with compilations() as found:
        for number in numbers_of(hparams):
            value = OTHERWISE.get(number, 1.1 * getattr(hparams, number))
            after = jax.tree.leaves(jax.device_get(everything(dataclasses.replace(hparams, **{number: value}))))
            assert any(np.any(a != b) for a, b in zip(after, before, strict=True)), f"{number} has no effect"
    assert not found


@pytest.mark.parametrize(("name", "kind"), OFFLINE_CASES)
def test_changing_a_number_of_an_offline_algorithm_compiles_nothing_and_has_an_effect(name, kind):
    batch, hparams = offline_batch(name, kind), tasks()[name].hparams(**OFFLINE[name])
    one, state = compiled(name, "step", tasks()[name].config()), state_of()
    before = jax.tree.leaves(jax.device_get(one(state, batch, arrays(hparams))))
    with compilations() as found:
        for number in numbers_of(hparams):
            changed = dataclasses.replace(hparams, **{number: 1.5 * getattr(hparams, number)})
            after = jax.tree.leaves(jax.device_get(one(state, batch, arrays(changed))))
            has_effect = any(np.any(a != b) for a, b in zip(after, before, strict=True))
            assert has_effect == (kind != "labelled" or number == "learning_rate"), number
    assert not found


def test_every_task_is_tested_here():
    assert set(tasks()) == {*ONLINE, *OFFLINE}


@pytest.mark.parametrize("stochastic_rounding", [None, True, False])
def test_rounding_of_bfloat16_parameters(stochastic_rounding):
    """Steps of a tenth of the last bit: ten of them move by one bit on average, and to nearest by none."""
    params = {"w": jnp.full((2048,), 1.0, jnp.bfloat16)}
    optimizer = make_optimizer("adamw_8bit", stochastic_rounding=stochastic_rounding)
    gradients, rate = jax.tree.map(jnp.ones_like, params), jnp.float32(-0.1 * 2**-7)
    step = jax.jit(lambda params, state: take_step(optimizer, gradients, state, params, learning_rate=rate))
    state = optimizer.init(params)
    for _ in range(10):
        params, state = step(params, state)
    moved = float(jnp.mean(params["w"].astype(jnp.float32)) - 1) / 2**-7
    assert moved == 0 if stochastic_rounding is False else moved == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_only_the_8_bit_optimizer_rounds_stochastically(name):
    with pytest.raises(InputError, match=f"stochastic_rounding=True: {name} rounds to nearest"):
        make_optimizer(name, stochastic_rounding=True)


@pytest.mark.parametrize("kind", ["together", "separate"])
def test_the_step_of_an_optimizer_is_its_update_without_the_difference(kind):
    optimizer = make_optimizer("adamw_8bit", max_grad_norm=0.5, weight_decay=0.1, is_critic=is_critic)
    if kind == "separate":
        optimizer = separate_optimizers(optimizer, make_optimizer("adamw", weight_decay=0.1), is_critic)
    chained = optax.chain(optax.scale(2.0), optimizer)  # for optax it is a transformation as any other
    params = jax.tree.map(jnp.asarray, weights()[1])
    rates = {"learning_rate": jnp.float32(0.01), "critic_learning_rate": jnp.float32(0.03)}
    states = optimizer.init(params), optimizer.init(params), chained.init(params)
    ends = [params] * 3
    with jax.numpy_dtype_promotion("standard"):
        for seed in range(3):
            gradients = jax.tree.map(jnp.asarray, weights(seed)[1])
            stepped, first = take_step(optimizer, gradients, states[0], ends[0], **rates)
            updates, second = optimizer.update(gradients, states[1], ends[1], **rates)
            halves = jax.tree.map(lambda x: 0.5 * x, gradients)
            of_chain, third = chained.update(halves, states[2], ends[2], **rates)
            states = first, second, third
            ends = [stepped, optax.apply_updates(ends[1], updates), optax.apply_updates(ends[2], of_chain)]
    same(ends[0], ends[1], rtol=1e-5, atol=1e-6)
    same(ends[1], ends[2], rtol=1e-5, atol=1e-6)
    assert not any(np.any(a == b) for a, b in zip(*map(jax.tree.leaves, (ends[0], params)), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_8bit_follows_adamw_with_a_quarter_of_its_state(dtype):
    params = {"a": jax.random.normal(jax.random.key(0), (64, 48)).astype(dtype), "b": jnp.ones((300,), dtype)}
    target = {"a": jnp.zeros((64, 48)), "b": jnp.linspace(-1.0, 1.0, 300)}

    def loss(params):
        return sum(jnp.mean((params[k].astype(jnp.float32) - target[k]) ** 2) for k in params)

    ends = {}
    for name in ("adamw", "adamw_8bit"):
        optimizer = make_optimizer(name, max_grad_norm=1.0, weight_decay=0.01)
        now, state = params, optimizer.init(params)

        @jax.jit
        def step(now, state, optimizer=optimizer):
            updates, state = optimizer.update(jax.grad(loss)(now), state, now, learning_rate=0.01)
            return optax.apply_updates(now, jax.tree.map(lambda u, p: u.astype(p.dtype), updates, now)), state

        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            for _ in range(100):
                now, state = step(now, state)
        ends[name] = float(loss(now)), sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert ends["adamw_8bit"][0] < 0.5 * float(loss(params))
    if dtype == "bfloat16":  # where AdamW's steps, rounded to nearest, are lost as the parameters are near their ends
        assert ends["adamw_8bit"][0] < ends["adamw"][0]
    else:
        assert ends["adamw_8bit"][0] == pytest.approx(ends["adamw"][0], rel=0.1)
        assert ends["adamw_8bit"][1] < ends["adamw"][1] / 3.7

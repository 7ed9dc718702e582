"""Dynamic loss scaling: overflows are skipped, small gradients survive, and nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapidfire_jax import init_state, make_optimizer, separate_optimizers
from rapidfire_jax.algorithms import rloo
from rapidfire_jax.algorithms.loss_scale import init_loss_scale, over_steps
from rapidfire_jax.algorithms.train_state import gradient_step
from tests.algorithms.bigram import apply, arrays, config_of, encode, is_critic, plain, rollouts_of, same, weights
from tests.helpers.compilations import compilations

ROWS = 8
OPTIMIZERS = {
    "sgd": lambda: make_optimizer("sgd", max_grad_norm=1.0),
    "adamw": lambda: make_optimizer("adamw", max_grad_norm=1.0, weight_decay=0.1),
    "adamw_8bit": lambda: make_optimizer("adamw_8bit", max_grad_norm=1.0),
    "separate": lambda: separate_optimizers(make_optimizer("adamw_8bit"), make_optimizer("adamw"), is_critic),
}


def network(trainable, x, dtype):
    hidden = jnp.tanh(x.astype(dtype) @ trainable["logits"].astype(dtype))
    return (hidden @ trainable["values"].astype(dtype)).astype(jnp.float32)


def loss(trainable, batch, dtype="float16"):
    """Squared error of a network of two layers, summed over the rows."""
    x, y = batch
    total = ((network(trainable, x, dtype) - y) ** 2).sum()
    return total, jnp.float32(len(x)), {}


def batch_of(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(ROWS, 4)).astype(np.float32), np.float32(size) * rng.normal(size=ROWS).astype(np.float32)


def start(optimizer, loss_scale=None):
    rng = np.random.default_rng(9)
    trainable = {"logits": rng.normal(size=(4, 6)), "values": rng.normal(size=6)}
    return init_state(None, jax.tree.map(jnp.float32, trainable), optimizer, loss_scale)


def step_of(optimizer, dtype="float16", micro_batches=1):
    rates = {"learning_rate": jnp.float32(0.01), "critic_learning_rate": jnp.float32(0.02)}
    of = functools.partial(loss, dtype=dtype)
    options = {"optimizer": optimizer, "rates": rates, "micro_batches": micro_batches}
    return jax.jit(lambda state, batch: gradient_step(state, batch, of, **options), donate_argnums=0)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_is_skipped_and_training_goes_on(name, micro_batches):
    optimizer = OPTIMIZERS[name]()
    step = step_of(optimizer, micro_batches=micro_batches)
    state = start(optimizer, init_loss_scale(1024.0))
    for seed in range(2):
        state, metrics = step(state, batch_of(seed))
    assert (metrics["precision/loss_scale"], metrics["precision/skipped_steps"]) == (1024, 0)
    before = jax.device_get((state.trainable, state.opt_state, state.step))

    overflowing = batch_of(2)
    overflowing[1][5] = 1e4  # of one row, and so of one micro-batch
    state, metrics = step(state, overflowing)
    same(jax.device_get((state.trainable, state.opt_state, state.step)), before)
    assert np.isfinite(metrics["loss/total"]) and np.isnan(metrics["policy/gradient_norm"])
    assert (metrics["precision/loss_scale"], metrics["precision/skipped_steps"]) == (1024, 1)

    state, metrics = step(state, batch_of(3))
    assert (metrics["precision/loss_scale"], metrics["precision/skipped_steps"]) == (512, 1)
    assert np.isfinite(metrics["policy/gradient_norm"]) and state.step == 3
    moved = jax.tree.map(lambda a, b: np.any(a != b), jax.device_get(state.trainable), before[0])
    assert all(jax.tree.leaves(moved))

    # As if the batch had never been, but for a scale that is half.
    alone = start(optimizer, init_loss_scale(1024.0))
    for seed in (0, 1, 3):
        alone, _ = step(alone, batch_of(seed))
    same(alone.trainable, state.trainable, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e6])
def test_a_forward_pass_that_overflows_is_an_overflow_too(value):
    optimizer = make_optimizer("adamw")
    state, (x, y) = start(optimizer, init_loss_scale(4.0)), batch_of(0)
    before = jax.device_get(state.trainable)
    if np.isfinite(value):
        x[0] *= value  # infinite in float16; tanh of it is 1 and loses the gradient's way: inf x 0
    else:
        y[0] = value
    state, metrics = step_of(optimizer)(state, (x, y))
    same(jax.device_get(state.trainable), before)
    assert (state.loss_scale.scale, state.loss_scale.skipped, state.step) == (2, 1, 0)
    assert np.isnan(metrics["policy/gradient_norm"])


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradients_are():
    def loss(trainable, batch):
        return jax.lax.stop_gradient(jnp.inf) + trainable["w"].sum(), jnp.float32(2), {}

    optimizer = make_optimizer("sgd")
    state = init_state(None, {"w": jnp.ones(3)}, optimizer, init_loss_scale())
    rates = {"learning_rate": jnp.float32(1), "critic_learning_rate": jnp.float32(1)}
    state, metrics = gradient_step(state, jnp.ones(2), loss, optimizer=optimizer, rates=rates)
    same(state.trainable, {"w": np.ones(3)})
    assert state.loss_scale.skipped == 1 and np.isnan(metrics["policy/gradient_norm"])


@pytest.mark.parametrize("scale", [1.0, 2.0**9, 2.0**24])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_without_an_overflow_the_steps_are_those_without_a_scale(scale, micro_batches):
    """In float32 and float64, in which powers of 2 do not round."""
    optimizer = make_optimizer("adamw", max_grad_norm=1.0)
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            step = step_of(optimizer, dtype, micro_batches)
            ends = []
            for loss_scale in (None, init_loss_scale(scale)):
                state = start(optimizer, loss_scale)
                for seed in range(3):
                    state, metrics = step(state, batch_of(seed))
                ends.append((state.trainable, metrics["loss/total"], metrics["policy/gradient_norm"]))
            same(*jax.device_get(ends), rtol=1e-6)


def test_gradients_that_float16_cannot_hold_survive():
    """Against central differences in float64: of 1e-9 a weight, where float16 ends at 6e-8."""
    x, _ = batch_of(0)
    w, small = np.float64([0.3, -0.2, 0.1, 0.4]), 1e-9

    def of(trainable, batch):
        y = (batch.astype(jnp.float16) @ trainable["w"].astype(jnp.float16)).astype(jnp.float32)
        return small * (y**2).sum(), jnp.float32(len(batch)), {}

    exact = 2 * small * (x.astype(np.float64).T @ (x @ w)) / ROWS
    optimizer = make_optimizer("sgd")
    rates = {"learning_rate": jnp.float32(1e6), "critic_learning_rate": jnp.float32(1e6)}
    moved = {}
    for scale in (None, 2.0**24):
        state = init_state(None, {"w": jnp.float32(w)}, optimizer, None if scale is None else init_loss_scale(scale))
        state, _ = gradient_step(state, jnp.asarray(x), of, optimizer=optimizer, rates=rates)
        moved[scale] = (np.asarray(state.trainable["w"], np.float64) - np.float32(w)) / -1e6
    assert not moved[None].any()
    np.testing.assert_allclose(moved[2.0**24], exact, rtol=5e-3, atol=2e-3 * abs(exact).max())


@pytest.mark.parametrize(("first", "interval"), [(8.0, 3), (2.0**24, 2), (1.0, 1), (2.0**15, 2000)])
def test_the_scale_against_a_loop(first, interval):
    finite = np.random.default_rng(3).random(60) < 0.7
    after = jax.jit(lambda state, finite: state.after(finite))
    state, scale, in_a_row = init_loss_scale(first, interval), first, 0
    for i, is_finite in enumerate(finite):
        state = after(state, is_finite)
        if is_finite:
            in_a_row += 1
            if in_a_row == interval:
                scale, in_a_row = min(2 * scale, 2**24), 0
        else:
            scale, in_a_row = max(scale / 2, 1), 0
        assert (state.scale, state.in_a_row, state.skipped) == (scale, in_a_row, (~finite[: i + 1]).sum())
    assert after._cache_size() == 1


def half_apply(frozen, trainable, inputs, length, temperature):
    """The bigram model with weights, and so gradients, in float16."""
    halved = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), trainable)
    return apply(frozen, halved, inputs, length, temperature)


@functools.cache
def update_of(config, optimizer):
    options = {"apply": half_apply, "encode": encode, "optimizer": optimizer, "config": config}
    return jax.jit(functools.partial(rloo.rloo_update, **options), donate_argnums=0)


@pytest.mark.parametrize("target_kl", [None, 1e9, 1e-9])
def test_minibatches_of_an_update(target_kl):
    """Two groups of three, a row a step: the steps of the group with a huge score overflow, the others are taken."""
    optimizer, config = make_optimizer("sgd"), config_of("rloo", minibatches=6)
    noise = 0.2 if target_kl == 1e-9 else 0.0  # a first step further away than that, or none that is clipped
    rollouts = rollouts_of(4, noise=noise, token_reward_t=None, importance_t=None)
    huge = dataclasses.replace(rollouts, score=np.float32([1, 2, 4, 1e6, 2e6, 4e6]))
    hparams = arrays(plain("rloo", target_kl=target_kl, kl_coef=0.0))
    step = update_of(config, optimizer)

    def fresh(loss_scale):
        return init_state(*jax.tree.map(jnp.asarray, weights()), optimizer, loss_scale)

    state, metrics = step(fresh(init_loss_scale(2.0**13)), huge, hparams, jax.random.key(0))
    if target_kl == 1e-9:
        assert metrics["policy/steps_taken"] == 0 == state.step
        assert (state.loss_scale.scale, metrics["precision/skipped_steps"]) == (2**13, 0)
        return
    assert (state.step, state.loss_scale.skipped, metrics["precision/skipped_steps"]) == (3, 3, 3)
    assert state.loss_scale.scale == 2**10 and metrics["precision/loss_scale"] in (2**10, 2**11)
    assert all(np.isfinite(x) for x in jax.tree.leaves(jax.device_get(metrics)))
    with compilations() as found:
        for seed in (1, 2):
            state, metrics = step(state, rollouts, hparams, jax.random.key(seed))
    assert not found
    assert state.step == 15 and metrics["precision/skipped_steps"] == 3

    # Of steps that all overflow nothing is known but that; the job leaves such metrics out.
    all_huge = dataclasses.replace(rollouts, score=1e9 * huge.score)
    state, metrics = step(fresh(init_loss_scale(2.0**13)), all_huge, hparams, jax.random.key(3))
    assert state.step == 0 and metrics["precision/skipped_steps"] == 6 and np.isnan(metrics["policy/gradient_norm"])


def test_numbers_of_several_steps():
    metrics = {
        "loss/total": jnp.float32([1, np.nan, 3, 100]),
        "norm": jnp.float32([np.inf, np.nan, np.nan, 7]),
        "precision/loss_scale": jnp.float32([8, 8, 4, 2]),
        "precision/skipped_steps": jnp.float32([0, 1, 1, 0]),
    }
    found = over_steps(metrics, jnp.array([True, True, True, False]))
    assert np.isnan(found.pop("norm"))
    assert found == {"loss/total": 2, "precision/loss_scale": 4, "precision/skipped_steps": 1}
    none = over_steps(metrics, jnp.zeros(4, bool))
    assert np.isnan(none["loss/total"]) and none["precision/loss_scale"] == 8

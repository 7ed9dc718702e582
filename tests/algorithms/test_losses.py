"""Losses and their gradients in float64 against the equations of the papers and central differences of these.

Central differences are exact to about 1e-9 here as long as no ratio and no value stands within 1e-6 of a kink.
"""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapidfire_jax import PolicyBatch, PPOBatch, policy_loss, ppo_loss, value_loss
from rapidfire_jax.algorithms import tasks
from rapidfire_jax.algorithms.masking import finish
from rapidfire_jax.algorithms.surrogate import log_ratios
from tests.algorithms.bigram import ONLINE, QUICKLY, config_of, hparams_of, plain
from tests.helpers import oracles

B, T = 5, 6
LEVELS, AGGREGATIONS = ("token", "sequence", "trajectory"), ("token", "sequence", "fixed")
MASK = np.array([[1] * 6, [1, 0, 1, 0, 1, 1], [0] * 6, [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]], bool)
EXACT = {"rtol": 1e-6, "atol": 1e-8}


def drawn(seed):
    """A batch, and log-probabilities, entropies and values near enough that about half of it is clipped."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.normal(size=(B, T))  # noqa: E731
    old, old_v = draw() - 2, draw()
    fields = {"old_logp_t": old, "old_v_t": old_v, "adv_t": draw(), "return_t": draw(), "ref_logp_t": draw() - 2}
    batch = PPOBatch(None, MASK, **fields, importance_t=rng.uniform(0.5, 1.5, size=(B, T)))
    return batch, old + 0.5 * draw(), abs(draw()), old_v + 0.4 * draw()


def without_critic(batch):
    return PolicyBatch(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(PolicyBatch)})


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_policy_loss(level, how):
    batch, logp, _, _ = drawn(1)
    options = list(itertools.product((None, 0.35), (None, 1.2), (False, True)))

    def loss(logp, high, dual, weighted):
        return policy_loss(
            logp, batch.old_logp_t, batch.adv_t, MASK, 0.2, clip_range_high=high, dual_clip=dual,
            importance_t=batch.importance_t if weighted else None, level=level, aggregation=how,
        )  # fmt: skip

    with jax.enable_x64(True):
        run = lambda logp: [jax.value_and_grad(loss, has_aux=True)(logp, *option) for option in options]  # noqa: E731
        ours = jax.jit(run, compiler_options=QUICKLY)(logp)
    seen = set()
    for ((total, count), gradient), (high, dual, weighted) in zip(ours, options, strict=True):
        importance = batch.importance_t if weighted else None
        theirs = functools.partial(
            oracles.surrogate, old=batch.old_logp_t, adv=batch.adv_t, mask=MASK, low=0.2, high=high, dual=dual,
            importance=importance, level=level, how=how,
        )  # fmt: skip
        np.testing.assert_allclose((total, count), theirs(logp), **EXACT)
        np.testing.assert_allclose(gradient, oracles.slope(lambda x, f=theirs: f(x)[0], logp), **EXACT)
        seen.add(round(float(total), 6))
    assert len(seen) == len(options), "an option had no effect"


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip, how):
    batch, _, _, v = drawn(2)
    with jax.enable_x64(True):
        loss = lambda v: value_loss(v, batch.old_v_t, batch.return_t, MASK, clip, aggregation=how)  # noqa: E731
        (total, count), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(v)
    theirs = lambda v: oracles.value(v, batch.old_v_t, batch.return_t, MASK, clip, how)  # noqa: E731
    np.testing.assert_allclose((total, count), theirs(v), **EXACT)
    np.testing.assert_allclose(gradient, oracles.slope(lambda x: theirs(x)[0], v), **EXACT)


OPTIONS = {
    "as it is": {},
    "everything": {"everything": True},
    "KL in the loss": {"kl_in": "loss", "kl_estimator": "k3"},
    "k2": {"kl_in": "loss", "kl_estimator": "k2", "everything": True},
    "by sequence": {"kl_in": "loss", "kl_estimator": "abs", "aggregation": "sequence"},
    "by length": {"kl_in": "loss", "kl_estimator": "k1", "aggregation": "fixed", "everything": True},
    "DAPO": {"aggregation": "token", "hparams": {"clip_range_high": 0.28, "kl_coef": 0.0}},
    "Dr. GRPO": {"scale": "none", "aggregation": "fixed"},
    "GSPO": {"ratio_level": "sequence", "hparams": {"clip_range": 3e-4, "clip_range_high": 4e-4}},
    "token ratios": {"ratio_level": "token", "aggregation": "token"},
    "no value clip": {"hparams": {"value_clip_range": None}},
}


def has(name, option):
    """Whether an algorithm has all settings of an option."""
    known = {field.name for kind in (tasks()[name].config, tasks()[name].hparams) for field in dataclasses.fields(kind)}
    return known >= (OPTIONS[option].keys() | OPTIONS[option].get("hparams", {}).keys()) - {"hparams", "everything"}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in ONLINE for option in OPTIONS if has(name, option)]
)
def test_loss_of_an_algorithm(name, option):
    changes = dict(OPTIONS[option])
    hparams = (hparams_of if changes.pop("everything", False) else plain)(name)
    numbers = changes.pop("hparams", {})
    task = tasks()[name]
    hparams, config = dataclasses.replace(hparams, **numbers), config_of(name, **changes)
    batch, *outputs = drawn(3)
    batch = batch if name == "ppo" else without_critic(batch)

    def loss(*outputs):
        total, count, metrics = task.loss(SimpleNamespace(**outputs_of(outputs)), batch, hparams, config)
        return total, (count, finish(metrics))

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICKLY)
        found = run(*outputs)
    (total, (count, metrics)), gradients = found
    theirs = lambda *outputs: oracles.online_loss(name, *outputs, batch, hparams, config)  # noqa: E731
    np.testing.assert_allclose((total, count), theirs(*outputs), **EXACT)
    for place, gradient in enumerate(gradients):
        along = lambda x, i=place: theirs(*outputs[:i], x, *outputs[i + 1 :])[0]  # noqa: E731
        np.testing.assert_allclose(gradient, oracles.slope(along, outputs[place]), **EXACT)
    check_metrics(metrics, outputs, batch, hparams, config)


def outputs_of(outputs):
    return dict(zip(("logp_t", "entropy_t", "v_t"), outputs, strict=True))


def check_metrics(metrics, outputs, batch, hparams, config):
    logp, entropy, v = outputs
    level, how = getattr(config, "ratio_level", "token"), config.aggregation
    difference = (logp - batch.old_logp_t)[MASK]
    ratio = oracles.ratios(logp, batch.old_logp_t, MASK, level)[MASK]
    high = hparams.clip_range if hparams.clip_range_high is None else hparams.clip_range_high
    expected = {
        "policy/entropy": entropy[MASK].mean(),
        "policy/approx_kl": (np.exp(difference) - 1 - difference).mean(),
        "policy/log_ratio": abs(difference).mean(),
        "policy/ratio_max_deviation": abs(np.exp(difference) - 1).max(),
        "policy/clip_fraction": ((ratio < 1 - hparams.clip_range) | (ratio > 1 + high)).mean(),
    }
    if isinstance(batch, PPOBatch):
        total, count = oracles.value(v, batch.old_v_t, batch.return_t, MASK, hparams.value_clip_range, how)
        expected["loss/value"] = total / count
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, **EXACT, err_msg=key)


def test_ppo_loss_is_the_loss_of_its_step():
    batch, *outputs = drawn(4)
    hparams, config = hparams_of("ppo"), config_of("ppo")
    with jax.enable_x64(True):
        total, count, metrics = ppo_loss(*outputs, batch, hparams, config)
        again = tasks()["ppo"].loss(SimpleNamespace(**outputs_of(outputs)), batch, hparams, config)
        again = *again[:2], finish(again[2])
    jax.tree.map(np.testing.assert_array_equal, (total, count, metrics), again)


def test_no_ratio_is_infinite():
    old = np.zeros((1, 3))
    for level in LEVELS:
        log_ratio = log_ratios(jnp.array([[500.0, 500.0, -900.0]]), old, np.ones((1, 3), bool), level)
        assert np.isfinite(np.exp(log_ratio)).all()


def poisoned(tree, mask, poison):
    """`poison` in every number of a token where `mask` is False."""
    put = lambda x: np.where(mask, x, np.asarray(poison, x.dtype)) if x.dtype == np.float32 else x  # noqa: E731
    return jax.tree.map(put, tree)


@functools.cache
def gradients_of(name, **changes):
    """Of every aggregation and level that it has."""
    task, hparams = tasks()[name], hparams_of(name)
    levels = (
        ("token",) if name in ("ppo", "reinforce_pp") else ("token", "sequence") + ("trajectory",) * (name == "rloo")
    )
    settings = [
        {"kl_in": "loss", "aggregation": how} | ({} if len(levels) == 1 else {"ratio_level": level})
        for level, how in itertools.product(levels, AGGREGATIONS)
    ]

    def everything(outputs, batch):
        def loss(outputs, setting):
            total, count, metrics = task.loss(
                SimpleNamespace(**outputs), batch, hparams, config_of(name, kl_estimator="k3", **setting)
            )
            return total, (count, finish(metrics))

        return [jax.value_and_grad(loss, has_aux=True)(outputs, setting) for setting in settings]

    return jax.jit(everything, compiler_options=QUICKLY)


def single(name, seed):
    """A batch in float32."""
    batch, *outputs = drawn(seed)
    batch = batch if name == "ppo" else without_critic(batch)
    narrow = lambda x: x.astype(np.float32) if x.dtype == np.float64 else x  # noqa: E731
    return jax.tree.map(narrow, (outputs_of(outputs), batch))


@pytest.mark.parametrize("name", ONLINE)
def test_masked_positions_have_neither_effect_nor_gradient(name):
    outputs, batch = single(name, 5)
    clean = gradients_of(name)(outputs, batch)
    for (_, (_, metrics)), gradients in clean:
        assert all(np.isfinite(x) for x in metrics.values())
        for gradient in gradients.values():
            assert (np.asarray(gradient)[~MASK] == 0).all()
    for poison in (np.nan, np.inf, -np.inf, 1e30):
        dirty = gradients_of(name)(*poisoned((outputs, batch), MASK, poison))
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize("name", ONLINE)
def test_empty_mask(name):
    outputs, batch = single(name, 6)
    nothing = np.zeros((B, T), bool)
    batch = poisoned(dataclasses.replace(batch, mask_t=nothing), nothing, np.nan)
    for (total, (count, metrics)), gradients in gradients_of(name)(poisoned(outputs, nothing, np.nan), batch):
        assert total == 0 and count == 0
        assert all(x == 0 for x in (*metrics.values(), *map(np.max, map(abs, map(np.asarray, gradients.values())))))


@pytest.mark.parametrize("name", ONLINE)
def test_first_step_is_reinforce(name):
    """Where the policy is still the one that sampled, the gradient is that of advantage x log-probability."""
    outputs, batch = single(name, 7)
    outputs["logp_t"] = batch.old_logp_t
    batch = dataclasses.replace(batch, importance_t=None, ref_logp_t=batch.old_logp_t)
    if name in ("grpo", "rloo"):  # a response has one advantage
        batch = dataclasses.replace(batch, adv_t=np.broadcast_to(batch.adv_t[:, :1], (B, T)).copy())
    config = config_of(name, kl_in="loss", kl_estimator="k3")
    hparams = plain(name, kl_coef=0.3)

    def loss(logp):
        changed = SimpleNamespace(**outputs | {"logp_t": logp})
        total, _, metrics = tasks()[name].loss(changed, batch, hparams, config)
        return total, finish(metrics)

    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(outputs["logp_t"])
    weight = np.where(MASK, 1.0, 0.0)
    if config.aggregation == "sequence" and name == "grpo":
        weight = weight / np.maximum(MASK.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(gradient, -batch.adv_t * weight, rtol=1e-6)
    assert metrics["policy/ratio_max_deviation"] == 0 and metrics["policy/approx_kl"] == 0
    assert metrics["loss/kl"] == 0 and metrics["policy/clip_fraction"] == 0


CONSTANTS = {
    "policy_loss": lambda x: policy_loss(*x[:3], MASK, 0.2),
    "value_loss": lambda x: value_loss(*x[:3], MASK, 0.2),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_gradients_flow_to_the_first_argument_alone(name):
    batch, logp, _, _ = drawn(8)
    of_logp, *others = jax.jit(jax.grad(lambda x: CONSTANTS[name](x)[0]))(
        tuple(np.float32(x) for x in (logp, batch.old_logp_t, batch.adv_t))
    )
    assert np.any(of_logp)
    for gradient in others:
        assert not np.any(gradient)


def test_gradients_do_not_flow_to_the_reference():
    outputs, batch = single("grpo", 9)
    config = config_of("grpo", kl_in="loss", kl_estimator="k3")

    def loss(ref):
        of = dataclasses.replace(batch, ref_logp_t=ref)
        return tasks()["grpo"].loss(SimpleNamespace(**outputs), of, plain("grpo", kl_coef=0.5), config)[0]

    assert not np.any(jax.jit(jax.grad(loss))(batch.ref_logp_t))

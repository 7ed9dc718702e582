"""The smallest language model and rollouts for it: what the tests of whole steps train.

Trained are a table of next-token logits and a value a token, so that everything a step does can be done again by hand.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rapidfire_jax
from rapidfire_jax import (
    CompletionBatch,
    LabelledBatch,
    PreferenceBatch,
    Rollouts,
    init_state,
    make_optimizer,
)
from rapidfire_jax.algorithms import tasks
from rapidfire_jax.algorithms.reward_shaping import init_stats

P, T, V = 3, 5, 7
ONLINE = ("ppo", "grpo", "rloo", "reinforce_pp")
TEMPERATURE = 0.8
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # programs that run once


class Out(NamedTuple):
    logp_t: jax.Array
    entropy_t: jax.Array
    v_t: jax.Array
    next_v: jax.Array


def encode(frozen, tokens, attention_mask):
    return tokens, attention_mask


def apply(frozen, trainable, inputs, length, temperature):
    tokens, mask = inputs
    before = tokens[:, -length - 1 : -1]
    logps = jax.nn.log_softmax((frozen["logits"] + trainable["logits"])[before] / temperature)
    logp_t = jnp.take_along_axis(logps, tokens[:, -length:, None], -1)[..., 0]
    last = jnp.argmax(jnp.where(mask.astype(bool), jnp.arange(tokens.shape[1])[None], -1), axis=1)
    values = trainable["values"][tokens]
    next_v = jnp.take_along_axis(values, last[:, None], 1)[:, 0]
    return Out(logp_t, -(jnp.exp(logps) * logps).sum(-1), values[:, -length - 1 : -1], next_v)


def reference(frozen, inputs, length, temperature):
    nothing = {"logits": jnp.zeros((V, V)), "values": jnp.zeros((V,))}
    return apply(frozen, nothing, inputs, length, temperature).logp_t


def score(frozen, trainable, tokens, mask):
    """As a reward model: the mean value of the real tokens."""
    values = jnp.where(mask, trainable["values"][tokens], 0.0)
    return values.sum(axis=1) / jnp.maximum(mask.sum(axis=1, dtype=jnp.float32), 1.0)


POLICY = SimpleNamespace(encode=encode, apply=apply, reference=reference)
SCORER = SimpleNamespace(apply=score)


def is_critic(trainable):
    """Of whatever stands in the place of the parameters."""
    return {key: jax.tree.map(lambda _, key=key: key == "values", part) for key, part in trainable.items()}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {"logits": draw(V, V)}, {"logits": 0.3 * draw(V, V), "values": draw(V)}


def state_of(optimizer=None, seed=0):
    return init_state(*jax.tree.map(jnp.asarray, weights(seed)), optimizer or make_optimizer("sgd"))


def by_hand(frozen, trainable, tokens, temperature=TEMPERATURE, length=T):
    """Log-probabilities, entropies and values of the response tokens, float64."""
    table = (np.float64(frozen["logits"]) + np.float64(trainable["logits"])) / np.float64(temperature)
    table = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    before, after = tokens[:, -length - 1 : -1], tokens[:, -length:]
    entropy = -(np.exp(table) * table).sum(axis=1)
    return table[before, after], entropy[before], np.float64(trainable["values"])[before]


def rollouts_of(seed=0, rows=6, lengths=(2, 5, 1, 4, 3, 5), noise=0.2, **changes):
    """Rollouts of unequal lengths, every optional field given; `noise` nats between the sampler and the policy."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    lengths = np.resize(lengths, rows)
    mask_t = np.arange(T) < lengths[:, None]
    prompts = np.arange(P) >= rng.integers(0, P, size=(rows, 1))
    attention_mask = np.concatenate([prompts, mask_t], axis=1)
    tokens = np.where(attention_mask, rng.integers(1, V, size=(rows, P + T)), 0).astype(np.int32)
    frozen, trainable = weights()
    logp, _, v = (x.astype(np.float32) for x in by_hand(frozen, trainable, tokens))
    zeros = {"logits": np.zeros((V, V)), "values": np.zeros(V)}
    fields = {
        "old_logp_t": logp + noise * draw(rows, T),
        "old_v_t": v + 0.3 * draw(rows, T),
        "ref_logp_t": by_hand(frozen, zeros, tokens)[0].astype(np.float32),
        "score": 2 * draw(rows),
        "token_reward_t": 0.3 * draw(rows, T),
        "next_v": draw(rows),
        "importance_t": rng.uniform(0.5, 1.5, size=(rows, T)).astype(np.float32),
    }
    return Rollouts(tokens, attention_mask, mask_t, lengths < T, **fields | changes)


def hparams_of(name, **changes):
    """Everything that a number switches on, on."""
    everything = {
        "learning_rate": 0.05, "temperature": TEMPERATURE, "kl_coef": 0.1, "kl_target": 2.0, "kl_horizon": 50.0,
        "clip_range": 0.2, "clip_range_high": 0.3, "dual_clip": 1.5, "entropy_coef": 0.02, "reward_clip": 1.5,
        "missing_eos_penalty": 0.25, "overlong_penalty": 0.5, "overlong_buffer": 2.0, "target_kl": 0.5,
        "importance_cap": 1.1, "gamma": 0.9, "lam": 0.8, "value_clip_range": 0.2, "value_coef": 0.3,
        "critic_learning_rate": 0.1, "critic_warmup": 0.0,
    } | changes  # fmt: skip
    known = {field.name for field in dataclasses.fields(tasks()[name].hparams)}
    return tasks()[name].hparams(**{key: value for key, value in everything.items() if key in known})


def plain(name, **changes):
    """Defaults."""
    return tasks()[name].hparams(**{"learning_rate": 0.05, "temperature": TEMPERATURE} | changes)


def config_of(name, **changes):
    """One step on everything, in groups of three where there are groups."""
    groups = {} if name == "ppo" else {"group_size": 3}
    return tasks()[name].config(**{"epochs": 1} | groups | changes)


def arrays(hparams):
    return jax.tree.map(np.float32, hparams)


@functools.cache
def compiled(name, what, config, optimizer=None):
    """`{name}_{what}` of the package under jit."""
    options = {"config": config, "optimizer": optimizer or make_optimizer("sgd")}
    if not tasks()[name].online:
        options["model"] = SCORER if name == "reward_model" else POLICY
    else:
        options["apply"] = apply
    if what in ("update", "learn"):
        options["encode"] = encode
    if what == "learn":
        options["reference"] = reference
    return jax.jit(functools.partial(getattr(rapidfire_jax, f"{name}_{what}"), **options), compiler_options=QUICKLY)


def update(name, rollouts, hparams, config, state=None, seed=0, optimizer=None):
    state = state_of(optimizer) if state is None else state
    return compiled(name, "update", config, optimizer)(state, rollouts, arrays(hparams), jax.random.key(seed))


def targets_of(name, rollouts, hparams, config):
    """The batch of a step, metrics, statistics."""
    return compiled_targets(name, config)(rollouts, arrays(hparams))


@functools.cache
def compiled_targets(name, config):
    def targets(rollouts, hparams):
        inputs = encode(None, rollouts.tokens, rollouts.attention_mask)
        return tasks()[name].targets(rollouts, inputs, init_stats(), hparams, config)

    return jax.jit(targets, compiler_options=QUICKLY)


def offline_batch(name, kind="preferences"):
    """Six rows with unequal numbers of tokens."""
    rng = np.random.default_rng(18)
    tokens = rng.integers(1, V, size=(6, 2, P + T)).astype(np.int32)
    lengths = np.array([[5, 1], [2, 4], [3, 3], [1, 5], [4, 2], [5, 5]])
    mask_t = np.arange(T) < lengths[..., None]
    attention = np.concatenate([np.ones((6, 2, P), bool), mask_t], axis=-1)
    if name == "sft":
        segments = np.where(attention[:, 0], 1 + (np.arange(P + T) > 3), 0).astype(np.int32)
        return CompletionBatch(tokens[:, 0], segments, rng.random((6, P + T)) < 0.7)
    if kind == "labelled":
        return LabelledBatch(tokens[:, 0], attention[:, 0], np.float32([0, 1, 1, 0, 0.3, 1]))
    return PreferenceBatch(tokens, attention, mask_t, rng.random(6).astype(np.float32))


OFFLINE = {"sft": {}, "dpo": {"label_smoothing": 0.1}, "reward_model": {"margin_coef": 0.5, "centre_coef": 0.1}}
OFFLINE_CASES = [("sft", ""), ("dpo", ""), ("reward_model", "preferences"), ("reward_model", "labelled")]


def same(a, b, **tolerance):
    """Asserts that two trees are equal, bit for bit unless tolerances are given."""
    compare = functools.partial(np.testing.assert_allclose, **tolerance) if tolerance else np.testing.assert_array_equal
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        compare(x, y, err_msg=jax.tree_util.keystr(path))

"""Proximal policy optimisation as pure functions of arrays.

    ppo_step       one minibatch: loss, gradients of `state.trainable`, optimiser
    ppo_update     rewards, advantages, then epochs x minibatches of `ppo_step`
    ppo_learn      the reference's log-probabilities, then `ppo_update`
    ppo_iteration  rollout, reward, `ppo_learn`: one program when the reward can be traced

None of them is jitted: jit (and donate `state`) where you call them. Models enter as callables:

    apply(frozen, trainable, inputs, response_length, temperature) -> .logp_t, .entropy_t, .v_t  [B, T]
    reference(frozen, inputs, response_length, temperature) -> ref_logp_t  [B, T]
    encode(frozen, tokens, attention_mask) -> inputs: a pytree of arrays with B rows, whatever the first two want to see
    sample(frozen, trainable, prompts, prompt_mask, key, temperature) -> Rollouts without ref_logp_t and score
    reward(rollouts) -> score  [B]

References: Schulman et al., Proximal Policy Optimization Algorithms, 2017; Ziegler et al., Fine-Tuning Language Models
from Human Preferences, 2019; Stiennon et al., Learning to Summarize with Human Feedback, 2020.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rapidfire_jax.algorithms.advantages import gae
from rapidfire_jax.algorithms.kl import KLEstimator, kl_estimate
from rapidfire_jax.algorithms.masking import masked_mean, masked_sum, masked_variance, whiten

type Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """What fixes the shape of the computation. Static under jit."""

    epochs: int = 4
    minibatches: int = 1
    kl_estimator: KLEstimator = "k1"
    whiten_advantages: bool = True
    recompute: bool = False  # old log-probabilities and values from a pass of our own, not from the rollout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOHParams:
    """Numbers that may change between calls without a new compilation; vmap over them for a sweep."""

    learning_rate: Float[Array, ""] | float = 1e-5
    kl_coef: Float[Array, ""] | float = 0.05
    gamma: Float[Array, ""] | float = 1.0
    lam: Float[Array, ""] | float = 0.95
    clip_range: Float[Array, ""] | float = 0.2
    value_clip_range: Float[Array, ""] | float = 0.2
    value_coef: Float[Array, ""] | float = 0.1
    entropy_coef: Float[Array, ""] | float = 0.0
    temperature: Float[Array, ""] | float = 1.0
    reward_clip: Float[Array, ""] | float = float("inf")  # scores are clipped to [-reward_clip, reward_clip]
    missing_eos_penalty: Float[Array, ""] | float = 0.0  # subtracted from the score of responses that never ended


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes, and the frozen weights beside it."""

    frozen: Any
    trainable: Any
    opt_state: Any
    step: Int[Array, ""]  # optimiser steps taken


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Finished rollouts. B sequences of S tokens: the prompt padded on the left, then T response tokens."""

    tokens: Int[Array, "B S"]
    attention_mask: Bool[Array, "B S"]  # True on real tokens of prompt and response
    mask_t: Bool[Array, "B T"]  # True on response tokens up to and including EOS
    ended: Bool[Array, "B"]  # the response has an EOS
    old_logp_t: Float[Array, "B T"]  # nats, under the policy that sampled
    old_v_t: Float[Array, "B T"]
    ref_logp_t: Float[Array, "B T"] | None = None  # nats, under the reference policy
    score: Float[Array, "B"] | None = None  # reward of the whole response


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOBatch:
    """What one minibatch of the loss needs; the same fields as `Rollouts` where they have the same name."""

    inputs: Any  # of `apply`, B rows
    mask_t: Bool[Array, "B T"]
    old_logp_t: Float[Array, "B T"]
    old_v_t: Float[Array, "B T"]
    adv_t: Float[Array, "B T"]
    return_t: Float[Array, "B T"]


def init_state(frozen: Any, trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(frozen, trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))


def policy_loss(logp_t, old_logp_t, adv_t, mask_t, clip_range):
    """Clipped surrogate: `(sum, count)` over `mask_t` of `max(-adv ratio, -adv clip(ratio, 1 - c, 1 + c))`.

    Args:
      logp_t: [B, T] nats, of the policy being trained; the only input that gradients flow to.
      old_logp_t, adv_t, mask_t: [B, T].
      clip_range: c.

    References:
      Schulman et al. 2017, eq. 7.
    """
    ratio = jnp.exp(jnp.where(mask_t, logp_t - old_logp_t, 0.0))
    unclipped, clipped = -adv_t * ratio, -adv_t * jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return masked_sum(jnp.maximum(unclipped, clipped), mask_t)


def value_loss(v_t, old_v_t, return_t, mask_t, value_clip_range):
    """Clipped squared error: `(sum, count)` over `mask_t` of

        0.5 max((v - R)^2, (clip(v, old_v - c, old_v + c) - R)^2)

    Args:
      v_t: [B, T] values being trained; the only input that gradients flow to.
      old_v_t, return_t, mask_t: [B, T].
      value_clip_range: c.
    """
    clipped = jnp.clip(v_t, old_v_t - value_clip_range, old_v_t + value_clip_range)
    return masked_sum(0.5 * jnp.maximum((v_t - return_t) ** 2, (clipped - return_t) ** 2), mask_t)


def ppo_loss(
    logp_t: Float[Array, "B T"],
    entropy_t: Float[Array, "B T"],
    v_t: Float[Array, "B T"],
    batch: PPOBatch,
    hparams: PPOHParams,
) -> tuple[Float[Array, ""], Float[Array, ""], Metrics]:
    """Policy loss + value_coef x value loss - entropy_coef x entropy, as `(sum, count, metrics)` over response tokens.

    The mean loss is `sum / count`; sums and counts of several parts may be added before dividing. Gradients flow to
    the first three arguments and vanish where `batch.mask_t` is False. Metrics are means over the tokens of the batch.
    """
    mask_t = batch.mask_t
    policy_sum, count = policy_loss(logp_t, batch.old_logp_t, batch.adv_t, mask_t, hparams.clip_range)
    value_sum, _ = value_loss(v_t, batch.old_v_t, batch.return_t, mask_t, hparams.value_clip_range)
    entropy_sum, _ = masked_sum(entropy_t, mask_t)
    total = policy_sum + hparams.value_coef * value_sum - hparams.entropy_coef * entropy_sum

    log_ratio = jnp.where(mask_t, jax.lax.stop_gradient(logp_t) - batch.old_logp_t, 0.0)
    ratio = jnp.exp(log_ratio)
    outside = (jnp.abs(ratio - 1.0) > hparams.clip_range).astype(jnp.float32)
    safe = jnp.maximum(count, 1.0)
    metrics = {
        "loss/policy": policy_sum / safe,
        "loss/value": value_sum / safe,
        "policy/entropy": entropy_sum / safe,
        "policy/approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask_t),
        "policy/clip_fraction": masked_mean(outside, mask_t),
        "policy/ratio_max_deviation": jnp.max(jnp.abs(ratio - 1.0)),
    }
    return total, count, metrics


def ppo_step(
    state: TrainState,
    batch: PPOBatch,
    hparams: PPOHParams,
    *,
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: PPOConfig,
) -> tuple[TrainState, Metrics]:
    """One optimiser step on one minibatch.

    Args:
      state: parameters and optimiser state; gradients are taken for `state.trainable` alone.
      batch: the minibatch, B sequences.
      hparams: traced numbers. An optimiser of `make_optimizer` follows `hparams.learning_rate`; any other optax
        optimiser keeps the rate it was made with.
      apply: forward pass, see the module.
      optimizer: optax transformation.
      config: static settings (`ppo_step` itself reads none; `ppo_update` does).

    Returns:
      The new state, and metrics: means over the tokens of the minibatch, before the step.
    """
    del config

    def loss(trainable):
        out = apply(state.frozen, trainable, batch.inputs, batch.mask_t.shape[1], hparams.temperature)
        total, count, metrics = ppo_loss(out.logp_t, out.entropy_t, out.v_t, batch, hparams)
        mean = total / jnp.maximum(count, 1.0)
        return mean, metrics | {"loss/total": mean}

    gradients, metrics = jax.grad(loss, has_aux=True)(state.trainable)
    metrics["policy/gradient_norm"] = optax.tree.norm(gradients)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float and int32 in Adam's bias correction
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            gradients, state.opt_state, state.trainable, learning_rate=hparams.learning_rate
        )
    trainable = optax.apply_updates(state.trainable, updates)
    return TrainState(state.frozen, trainable, opt_state, state.step + 1), metrics


def shape_scores(score: Float[Array, "B"], ended: Bool[Array, "B"], hparams: PPOHParams) -> Float[Array, "B"]:
    """Clips the scores, then subtracts the penalty of responses without EOS."""
    clipped = jnp.clip(score, -hparams.reward_clip, hparams.reward_clip)
    return clipped - hparams.missing_eos_penalty * (~ended).astype(jnp.float32)


def ppo_targets(rollouts: Rollouts, inputs: Any, hparams: PPOHParams, config: PPOConfig) -> tuple[PPOBatch, Metrics]:
    """Token rewards, advantages and returns of finished rollouts; `inputs` are passed on.

        r_t = -kl_coef kl_t + [t is the last response token] score

    Advantages are whitened over the tokens of all B sequences when `config.whiten_advantages`. Metrics: sums over the
    tokens of a response, means over responses, KL in nats.
    """
    assert rollouts.score is not None
    assert rollouts.ref_logp_t is not None
    mask_t = rollouts.mask_t
    kl_t = jnp.where(mask_t, kl_estimate(rollouts.old_logp_t, rollouts.ref_logp_t, config.kl_estimator), 0.0)
    score = shape_scores(rollouts.score, rollouts.ended, hparams)
    position = jnp.arange(mask_t.shape[1])[None]
    last = mask_t & (position == mask_t.sum(axis=1, keepdims=True) - 1)
    r_t = -hparams.kl_coef * kl_t + jnp.where(last, score[:, None], 0.0)
    adv_t, return_t = gae(r_t, rollouts.old_v_t, mask_t, hparams.gamma, hparams.lam)
    residual = masked_variance(return_t - rollouts.old_v_t, mask_t)
    metrics = {
        "reward": rollouts.score.mean(),
        "objective/shaped_reward": r_t.sum(axis=1).mean(),
        "kl": kl_t.sum(axis=1).mean(),
        "response_length": mask_t.sum(axis=1, dtype=jnp.float32).mean(),
        "ended": rollouts.ended.astype(jnp.float32).mean(),
        "value/mean": masked_mean(rollouts.old_v_t, mask_t),
        "value/explained_variance": 1.0 - residual / jnp.maximum(masked_variance(return_t, mask_t), 1e-8),
    }
    if config.whiten_advantages:
        adv_t = whiten(adv_t, mask_t)
    return PPOBatch(inputs, mask_t, rollouts.old_logp_t, rollouts.old_v_t, adv_t, return_t), metrics


def ppo_update(
    state: TrainState,
    rollouts: Rollouts,
    hparams: PPOHParams,
    key: Array,
    *,
    apply: Callable[..., Any],
    encode: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: PPOConfig,
) -> tuple[TrainState, Metrics]:
    """`config.epochs` passes over the rollouts, each in a fresh random order cut into `config.minibatches` steps.

    Args:
      state, hparams, apply, optimizer, config: see `ppo_step`.
      rollouts: complete, with `ref_logp_t` and `score`; B must be a multiple of `config.minibatches`.
      key: orders the rows.

    Returns:
      The new state, and the metrics of `ppo_targets` together with those of `ppo_step` averaged over the steps;
      `policy/ratio_first` is the largest deviation of a ratio from 1 in the first minibatch.
    """
    inputs = encode(state.frozen, rollouts.tokens, rollouts.attention_mask)
    return _update(state, rollouts, inputs, hparams, key, apply=apply, optimizer=optimizer, config=config)


def _update(state, rollouts, inputs, hparams, key, *, apply, optimizer, config):
    rows = rollouts.tokens.shape[0]
    if rows % config.minibatches:
        raise ValueError(f"{rows} rollouts cannot be cut into {config.minibatches} equal minibatches")
    batch, objective = ppo_targets(rollouts, inputs, hparams, config)
    orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, config.epochs))

    def step(state, order):
        minibatch = jax.tree.map(lambda x: x[order], batch)
        return ppo_step(state, minibatch, hparams, apply=apply, optimizer=optimizer, config=config)

    state, metrics = jax.lax.scan(step, state, orders.reshape(config.epochs * config.minibatches, -1))
    first = metrics["policy/ratio_max_deviation"][0]
    return state, objective | jax.tree.map(jnp.mean, metrics) | {"policy/ratio_first": first}


def ppo_learn(
    state: TrainState,
    rollouts: Rollouts,
    hparams: PPOHParams,
    key: Array,
    *,
    apply: Callable[..., Any],
    reference: Callable[..., Array],
    encode: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: PPOConfig,
) -> tuple[TrainState, Metrics]:
    """Scores the rollouts by the reference (and by the policy, if `config.recompute`), then `ppo_update`.

    `rollouts` come with `score`. `policy/rollout_mismatch` is the mean absolute difference between the rollout's
    log-probabilities and those recomputed, in nats.
    """
    inputs = encode(state.frozen, rollouts.tokens, rollouts.attention_mask)
    rest = (inputs, rollouts.mask_t.shape[1], hparams.temperature)
    rollouts = dataclasses.replace(rollouts, ref_logp_t=reference(state.frozen, *rest))
    mismatch = {}
    if config.recompute:
        out = apply(state.frozen, state.trainable, *rest)
        difference = jnp.abs(out.logp_t - rollouts.old_logp_t)
        mismatch["policy/rollout_mismatch"] = masked_mean(difference, rollouts.mask_t)
        rollouts = dataclasses.replace(rollouts, old_logp_t=out.logp_t, old_v_t=out.v_t)
    state, metrics = _update(state, rollouts, inputs, hparams, key, apply=apply, optimizer=optimizer, config=config)
    return state, metrics | mismatch


def ppo_iteration(
    state: TrainState,
    prompts: tuple[Int[Array, "B P"], Bool[Array, "B P"]],
    hparams: PPOHParams,
    key: Array,
    *,
    sample: Callable[..., Rollouts],
    reward: Callable[[Rollouts], Array],
    apply: Callable[..., Any],
    reference: Callable[..., Array],
    encode: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: PPOConfig,
) -> tuple[TrainState, Metrics]:
    """A whole iteration as one function: rollout, reward, reference, advantages, updates.

    `prompts` are left-padded ids and their mask. Rewards that need the host (text, a server) cannot be traced: call
    `sample` and `ppo_learn` yourself then, with the two halves of `jax.random.split(key)`.
    """
    sample_key, learn_key = jax.random.split(key)
    rollouts = sample(state.frozen, state.trainable, *prompts, sample_key, hparams.temperature)
    rollouts = dataclasses.replace(rollouts, score=reward(rollouts))
    learner = {"apply": apply, "reference": reference, "encode": encode, "optimizer": optimizer, "config": config}
    return ppo_learn(state, rollouts, hparams, learn_key, **learner)

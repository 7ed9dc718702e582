"""Proximal policy optimisation as pure functions of arrays.

    ppo_step       one minibatch: loss, gradients of `state.trainable`, optimiser
    ppo_update     rewards, advantages, then epochs x minibatches of `ppo_step`
    ppo_learn      the reference's log-probabilities, then `ppo_update`
    ppo_iteration  rollout, reward, `ppo_learn`: one program when the reward can be traced

How models enter, and what the steps share with other algorithms, is in `rapidfire_jax.algorithms.online`.

References: Schulman et al., Proximal Policy Optimization Algorithms, 2017; Ziegler et al., Fine-Tuning Language Models
from Human Preferences, 2019; Stiennon et al., Learning to Summarize with Human Feedback, 2020.
"""

import dataclasses
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Le
from jaxtyping import Array, Bool, Float

from rapidfire_jax.algorithms import online, trl_parity
from rapidfire_jax.algorithms.advantages import gae
from rapidfire_jax.algorithms.binding import bind
from rapidfire_jax.algorithms.masking import (
    Metrics,
    PartialMetrics,
    finish,
    masked_mean,
    masked_variance,
    whiten,
)
from rapidfire_jax.algorithms.online import ELSEWHERE, Critic, NonNegative, Positive, Rollouts, surrogate_loss
from rapidfire_jax.algorithms.reward_shaping import RunningStats, init_stats, token_rewards

Fraction = Annotated[float, Ge(0), Le(1)]


@dataclasses.dataclass(frozen=True)
class PPOConfig(online.OnlineConfig):
    """What fixes the shape of the computation. Static under jit."""

    epochs: Positive = 4
    whiten_advantages: bool = True
    whiten_rewards: bool = False  # to variance 1, keeping their mean
    bootstrap_truncated: bool = False  # a response cut off goes on with the critic's estimate; needs recompute
    compat: Literal["trl"] | None = None  # see `rapidfire_jax.algorithms.trl_parity`
    whiten_groups: Positive = 1  # with compat: the ranks TRL would run on; each whitens its own rows
    eos_id: int | None = dataclasses.field(default=None, metadata=ELSEWHERE)  # with compat: counted in its statistics

    @property
    def temperature_shift(self) -> float:  # type: ignore[override]
        """What is added to the temperature before logits are divided by it."""
        return trl_parity.TEMPERATURE_SHIFT if self.compat == "trl" else 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOHParams(online.OnlineHParams):
    """Numbers that may change between calls without a new compilation; vmap over them for a sweep."""

    critic_learning_rate: NonNegative | None = dataclasses.field(default=None, metadata=ELSEWHERE)
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    value_clip_range: Annotated[float, Gt(0)] | None = 0.2
    value_coef: NonNegative = 0.1
    critic_warmup: NonNegative = 0.0  # optimiser steps of the critic alone; needs an optimiser that knows it


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
    ref_logp_t: Float[Array, "B T"] | None = None  # only for a KL penalty in the loss
    importance_t: Float[Array, "B T"] | None = None


def ppo_loss(
    logp_t: Float[Array, "B T"],
    entropy_t: Float[Array, "B T"],
    v_t: Float[Array, "B T"],
    batch: PPOBatch,
    hparams: PPOHParams,
    config: PPOConfig = PPOConfig(),
) -> tuple[Float[Array, ""], Float[Array, ""], Metrics]:
    """Policy loss + value_coef x value loss - entropy_coef x entropy, as `(sum, count, metrics)` over response tokens.

    With `kl_in` "loss", + kl_coef x KL. The mean loss is `sum / count`; sums and counts of several parts may be added
    before dividing. Gradients flow to the first three arguments and vanish where `batch.mask_t` is False (with
    `compat="trl"`, those of `v_t` one position later). Metrics are means over the tokens of the batch.
    """
    outputs = SimpleNamespace(logp_t=logp_t, entropy_t=entropy_t, v_t=v_t)
    total, count, metrics = _loss(outputs, batch, hparams, config)
    return total, count, finish(metrics)


def _loss(
    outputs: Any, batch: PPOBatch, hparams: PPOHParams, config: PPOConfig
) -> tuple[Float[Array, ""], Float[Array, ""], PartialMetrics]:
    if config.compat == "trl":
        return trl_parity.loss(outputs, batch, hparams)
    critic = Critic(outputs.v_t, batch.old_v_t, batch.return_t, hparams.value_clip_range, hparams.value_coef)
    return surrogate_loss(outputs, batch, hparams, config, critic=critic)


def ppo_targets(
    rollouts: Rollouts,
    inputs: Any,
    hparams: PPOHParams,
    config: PPOConfig,
    stats: RunningStats | None = None,
) -> tuple[PPOBatch, Metrics]:
    """Token rewards, advantages and returns of finished rollouts; `inputs` are passed on.

    Advantages are whitened over the tokens of all B sequences when `config.whiten_advantages`. For rewards and metrics
    see `rapidfire_jax.algorithms.reward_shaping.token_rewards`; `stats` are needed to normalise scores.
    """
    return _targets(rollouts, inputs, init_stats() if stats is None else stats, hparams, config)[:2]


def _targets(
    rollouts: Rollouts, inputs: Any, stats: RunningStats, hparams: PPOHParams, config: PPOConfig
) -> tuple[PPOBatch, Metrics, RunningStats]:
    assert rollouts.old_v_t is not None
    if config.compat == "trl":
        targets, metrics = trl_parity.targets(rollouts, hparams, config)
        of_loss = (targets.old_logp_t, targets.old_v_t, targets.adv_t, targets.return_t)
        return PPOBatch(inputs, rollouts.mask_t, *of_loss), metrics, stats
    mask_t, v_t = rollouts.mask_t, rollouts.old_v_t
    r_t, metrics, stats = token_rewards(rollouts, stats, hparams, config)
    if config.whiten_rewards:
        r_t = whiten(r_t, mask_t, keep_mean=True)
    next_v = None
    if config.bootstrap_truncated:
        if rollouts.next_v is None:
            raise ValueError("bootstrap_truncated needs the value after the last token: rollouts.next_v, or recompute")
        next_v = jnp.where(rollouts.ended, 0.0, rollouts.next_v)
    adv_t, return_t = gae(r_t, v_t, mask_t, hparams.gamma, hparams.lam, next_v)
    residual = masked_variance(return_t - v_t, mask_t)
    metrics |= {
        "value/mean": masked_mean(v_t, mask_t),
        "value/explained_variance": 1.0 - residual / jnp.maximum(masked_variance(return_t, mask_t), 1e-8),
    }
    if config.whiten_advantages:
        adv_t = whiten(adv_t, mask_t)
    ref_logp_t = rollouts.ref_logp_t if config.kl_in == "loss" else None
    batch = PPOBatch(inputs, mask_t, rollouts.old_logp_t, v_t, adv_t, return_t, ref_logp_t, rollouts.importance_t)
    return batch, metrics, stats


ALGORITHM = online.OnlineAlgorithm(
    PPOConfig, PPOHParams, _targets, _loss, has_critic=True, objection=trl_parity.objection
)

ppo_step = bind(online.step, ALGORITHM, "ppo_step")
ppo_update = bind(online.update, ALGORITHM, "ppo_update")
ppo_learn = bind(online.learn, ALGORITHM, "ppo_learn")
ppo_iteration = bind(online.iteration, ALGORITHM, "ppo_iteration")

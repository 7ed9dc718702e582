"""REINFORCE with the mean reward of the other responses to a prompt as baseline.

A response is one action: its reward holds the KL penalty of all its tokens, and its ratio is that of the whole
trajectory. In the first step after a rollout the ratio is 1 and the gradient that of REINFORCE.

References: Ahmadian et al., Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
LLMs, 2024; Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free!, 2019.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge

from rapidfire_jax.algorithms import online
from rapidfire_jax.algorithms.advantages import leave_one_out_advantages
from rapidfire_jax.algorithms.binding import bind
from rapidfire_jax.algorithms.masking import Aggregation, Metrics
from rapidfire_jax.algorithms.online import PolicyBatch, Rollouts, policy_batch, surrogate_loss
from rapidfire_jax.algorithms.reward_shaping import RunningStats, token_rewards
from rapidfire_jax.algorithms.surrogate import RatioLevel


@dataclasses.dataclass(frozen=True)
class RLOOConfig(online.OnlineConfig):
    """What fixes the shape of the computation. Static under jit."""

    group_size: Annotated[int, Ge(2)] = 4  # responses a prompt
    ratio_level: RatioLevel = "trajectory"
    aggregation: Aggregation = "sequence"
    kl_in: Literal["reward", "loss"] = "reward"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RLOOHParams(online.OnlineHParams):
    """Numbers that may change between calls without a new compilation; vmap over them for a sweep."""


def rloo_targets(
    rollouts: Rollouts, inputs: Any, stats: RunningStats, hparams: RLOOHParams, config: RLOOConfig
) -> tuple[PolicyBatch, Metrics, RunningStats]:
    """Advantages of whole responses: `leave_one_out_advantages` of the sums of their token rewards.

    Returns the batch, metrics, and the statistics to carry on. `rollouts` hold the responses of a prompt in a row.
    """
    r_t, metrics, stats = token_rewards(rollouts, stats, hparams, config)
    advantage = leave_one_out_advantages(r_t.sum(axis=1), config.group_size)
    adv_t = jnp.where(rollouts.mask_t, advantage[:, None], 0.0)
    return policy_batch(rollouts, inputs, adv_t, config), metrics, stats


def rloo_loss(outputs: Any, batch: PolicyBatch, hparams: RLOOHParams, config: RLOOConfig = RLOOConfig()):
    """`(sum, count, metrics)` of the clipped surrogate at `config.ratio_level`."""
    return surrogate_loss(outputs, batch, hparams, config, config.ratio_level)


ALGORITHM = online.OnlineAlgorithm(RLOOConfig, RLOOHParams, rloo_targets, rloo_loss)

rloo_step = bind(online.step, ALGORITHM, "rloo_step")
rloo_update = bind(online.update, ALGORITHM, "rloo_update")
rloo_learn = bind(online.learn, ALGORITHM, "rloo_learn")
rloo_iteration = bind(online.iteration, ALGORITHM, "rloo_iteration")

"""REINFORCE++: PPO's surrogate without a critic, on returns that are whitened over the whole batch.

References: Hu et al., REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization,
2025.
"""

import dataclasses
from typing import Annotated, Any

import jax
from annotated_types import Ge, Le

from rapidfire_jax.algorithms import online
from rapidfire_jax.algorithms.advantages import discounted_returns, group_advantages
from rapidfire_jax.algorithms.binding import bind
from rapidfire_jax.algorithms.masking import Metrics, last_position, whiten
from rapidfire_jax.algorithms.online import PolicyBatch, Positive, Rollouts, policy_batch, surrogate_loss
from rapidfire_jax.algorithms.reward_shaping import RunningStats, token_rewards


@dataclasses.dataclass(frozen=True)
class ReinforcePPConfig(online.OnlineConfig):
    """What fixes the shape of the computation. Static under jit."""

    group_size: Positive = 1  # responses a prompt; above 1, their mean score is subtracted (REINFORCE++-baseline)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReinforcePPHParams(online.OnlineHParams):
    """Numbers that may change between calls without a new compilation; vmap over them for a sweep."""

    gamma: Annotated[float, Ge(0), Le(1)] = 1.0


def reinforce_pp_targets(
    rollouts: Rollouts, inputs: Any, stats: RunningStats, hparams: ReinforcePPHParams, config: ReinforcePPConfig
) -> tuple[PolicyBatch, Metrics, RunningStats]:
    """Advantages of tokens: discounted returns of their rewards, whitened over all tokens of the batch (eq. 7 to 9).

    Returns the batch, metrics, and the statistics to carry on.
    """
    r_t, metrics, stats = token_rewards(rollouts, stats, hparams, config)
    if config.group_size > 1:
        total = r_t.sum(axis=1)
        baseline = total - group_advantages(total, config.group_size, "none")
        r_t = r_t - baseline[:, None] * last_position(rollouts.mask_t).astype(r_t.dtype)
    adv_t = whiten(discounted_returns(r_t, rollouts.mask_t, hparams.gamma), rollouts.mask_t)
    return policy_batch(rollouts, inputs, adv_t, config), metrics, stats


def reinforce_pp_loss(
    outputs: Any,
    batch: PolicyBatch,
    hparams: ReinforcePPHParams,
    config: ReinforcePPConfig = ReinforcePPConfig(),
):
    """`(sum, count, metrics)` of the clipped surrogate."""
    return surrogate_loss(outputs, batch, hparams, config)


ALGORITHM = online.OnlineAlgorithm(ReinforcePPConfig, ReinforcePPHParams, reinforce_pp_targets, reinforce_pp_loss)

reinforce_pp_step = bind(online.step, ALGORITHM, "reinforce_pp_step")
reinforce_pp_update = bind(online.update, ALGORITHM, "reinforce_pp_update")
reinforce_pp_learn = bind(online.learn, ALGORITHM, "reinforce_pp_learn")
reinforce_pp_iteration = bind(online.iteration, ALGORITHM, "reinforce_pp_iteration")

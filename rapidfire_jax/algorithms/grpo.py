"""Group-relative policy optimisation: the other responses to a prompt in place of a critic.

As it stands it is GRPO of Shao et al. 2024. Its descendants are settings:

    Dr. GRPO   scale: none, aggregation: fixed                                 Liu et al. 2025
    DAPO       clip_range_high: 0.28, aggregation: token, dynamic_sampling: true, kl_coef: 0, overlong_penalty, _buffer
               Yu et al. 2025
    GSPO       ratio_level: sequence, clip_range: 3e-4, clip_range_high: 4e-4   Zheng et al. 2025

References: Shao et al., DeepSeekMath, 2024; Liu et al., Understanding R1-Zero-Like Training, 2025; Yu et al., DAPO,
2025; Zheng et al., Group Sequence Policy Optimization, 2025.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge

from rapidfire_jax.algorithms import online
from rapidfire_jax.algorithms.advantages import Scaling, group_advantages, informative_groups
from rapidfire_jax.algorithms.binding import bind
from rapidfire_jax.algorithms.kl import KLEstimator
from rapidfire_jax.algorithms.masking import Aggregation, Metrics
from rapidfire_jax.algorithms.online import NonNegative, PolicyBatch, Rollouts, policy_batch, surrogate_loss
from rapidfire_jax.algorithms.reward_shaping import RunningStats, token_rewards


@dataclasses.dataclass(frozen=True)
class GRPOConfig(online.OnlineConfig):
    """What fixes the shape of the computation. Static under jit."""

    group_size: Annotated[int, Ge(2)] = 8  # responses a prompt
    scale: Scaling = "std"
    ratio_level: Literal["token", "sequence"] = "token"
    dynamic_sampling: bool = False  # sample on until every prompt of the batch has responses of different rewards
    max_sampling_rounds: Annotated[int, Ge(1)] = 4  # with dynamic_sampling: rollouts an iteration at most
    kl_in: Literal["reward", "loss"] = "loss"
    kl_estimator: KLEstimator = "k3"
    aggregation: Aggregation = "sequence"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GRPOHParams(online.OnlineHParams):
    """Numbers that may change between calls without a new compilation; vmap over them for a sweep."""

    kl_coef: NonNegative = 0.04


def grpo_targets(
    rollouts: Rollouts, inputs: Any, stats: RunningStats, hparams: GRPOHParams, config: GRPOConfig
) -> tuple[PolicyBatch, Metrics, RunningStats]:
    """Advantages of whole responses: `group_advantages` of the sums of their token rewards.

    Returns the batch, metrics, and the statistics to carry on. `rollouts` hold the responses of a prompt in a row.
    """
    r_t, metrics, stats = token_rewards(rollouts, stats, hparams, config)
    total = r_t.sum(axis=1)
    advantage = group_advantages(total, config.group_size, config.scale)
    adv_t = jnp.where(rollouts.mask_t, advantage[:, None], 0.0)
    informative = informative_groups(total, config.group_size).mean(dtype=jnp.float32)
    return policy_batch(rollouts, inputs, adv_t, config), metrics | {"objective/informative": informative}, stats


def grpo_loss(outputs: Any, batch: PolicyBatch, hparams: GRPOHParams, config: GRPOConfig = GRPOConfig()):
    """`(sum, count, metrics)` of the clipped surrogate at `config.ratio_level`, with the KL penalty in the loss."""
    return surrogate_loss(outputs, batch, hparams, config, config.ratio_level)


ALGORITHM = online.OnlineAlgorithm(GRPOConfig, GRPOHParams, grpo_targets, grpo_loss)

grpo_step = bind(online.step, ALGORITHM, "grpo_step")
grpo_update = bind(online.update, ALGORITHM, "grpo_update")
grpo_learn = bind(online.learn, ALGORITHM, "grpo_learn")
grpo_iteration = bind(online.iteration, ALGORITHM, "grpo_iteration")

"""From scores of responses to rewards of tokens: normalisation, clipping, penalties, the KL penalty."""

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rapidfire_jax.algorithms.kl import kl_estimate
from rapidfire_jax.algorithms.masking import Metrics, last_position

if TYPE_CHECKING:
    from rapidfire_jax.algorithms.online import OnlineConfig, OnlineHParams, Rollouts

type Normalization = Literal["none", "running", "reference"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningStats:
    """What an online run carries from one iteration to the next besides its weights."""

    kl_scale: Float[Array, ""]  # by which the adaptive controller has changed `kl_coef`
    score_count: Float[Array, ""]  # scores that the next two were measured on
    score_mean: Float[Array, ""]
    score_m2: Float[Array, ""]  # sum of squared deviations from the mean


def init_stats() -> RunningStats:
    """Before the first rollout."""
    return RunningStats(jnp.ones(()), jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))


def add_scores(stats: RunningStats, score: Float[Array, " B"]) -> RunningStats:
    """Statistics of all scores so far and those of one more batch.

    References:
      Chan et al., Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """
    count = jnp.asarray(score.shape[0], jnp.float32)
    mean = score.mean()
    shift, total = mean - stats.score_mean, stats.score_count + count
    return dataclasses.replace(
        stats,
        score_count=total,
        score_mean=stats.score_mean + shift * count / total,
        score_m2=stats.score_m2 + ((score - mean) ** 2).sum() + shift**2 * stats.score_count * count / total,
    )


def normalize_scores(
    score: Float[Array, " B"], stats: RunningStats, how: Normalization
) -> tuple[Float[Array, " B"], RunningStats]:
    """Scores shifted and scaled to mean 0 and standard deviation 1, and the statistics to carry on.

        running      over all rollouts of the run so far, these included
        reference    over the first rollouts of the run, which the reference policy made (up to the first that differ)

    While all scores are the same, they are only shifted.

    References:
      Stiennon et al., Learning to Summarize with Human Feedback, 2020, appendix C.1 (reference).
    """
    if how == "none":
        return score, stats
    updated = add_scores(stats, score)
    if how == "reference":
        first = stats.score_m2 == 0
        updated = jax.tree.map(lambda new, old: jnp.where(first, new, old), updated, stats)
    deviation = jnp.sqrt(updated.score_m2 / jnp.maximum(updated.score_count - 1.0, 1.0))
    return (score - updated.score_mean) / jnp.where(deviation > 0, deviation + 1e-6, 1.0), updated


def overlong_fraction(length: Float[Array, " B"], limit: int, buffer: Float[Array, ""] | float) -> Float[Array, " B"]:
    """How far a response reaches into the last `buffer` of `limit` tokens: 0 before them, 1 at the end.

    References:
      Yu et al., DAPO, 2025, eq. 13 (soft overlong punishment).
    """
    return jnp.clip(1.0 - (limit - length) / jnp.maximum(buffer, 1e-6), 0.0, 1.0)


def shape_scores(
    score: Float[Array, " B"],
    ended: Bool[Array, " B"],
    length: Float[Array, " B"],
    limit: int,
    hparams: "OnlineHParams",
) -> Float[Array, " B"]:
    """Clips scores to `[-reward_clip, reward_clip]`, then subtracts the penalties of missing EOS and of length.

    Args:
      score: of each response, normalised if it is to be.
      ended: whether the response has an EOS.
      length: tokens of the response.
      limit: tokens a response may have.
      hparams: the numbers.
    """
    if hparams.reward_clip is not None:
        score = jnp.clip(score, -hparams.reward_clip, hparams.reward_clip)
    missing = hparams.missing_eos_penalty * (~ended).astype(score.dtype)
    return score - missing - hparams.overlong_penalty * overlong_fraction(length, limit, hparams.overlong_buffer)


def token_rewards(
    rollouts: "Rollouts", stats: RunningStats, hparams: "OnlineHParams", config: "OnlineConfig"
) -> tuple[Float[Array, "B T"], Metrics, RunningStats]:
    """Rewards of tokens, metrics, and the statistics to carry on.

        r_t = token_reward_t + [t is the last token] score - [kl_in is reward] kl_coef kl_t

    Metrics are sums over the tokens of a response, means over responses; KL in nats.
    """
    assert rollouts.score is not None
    mask_t = rollouts.mask_t
    length = mask_t.sum(axis=1, dtype=jnp.float32)
    normal, stats = normalize_scores(rollouts.score, stats, config.reward_normalization)
    score = shape_scores(normal, rollouts.ended, length, mask_t.shape[1], hparams)
    r_t = jnp.where(last_position(mask_t), score[:, None], 0.0)
    total = rollouts.score
    if rollouts.token_reward_t is not None:
        token_reward_t = jnp.where(mask_t, rollouts.token_reward_t, 0.0)
        total = total + token_reward_t.sum(axis=1)
        r_t = r_t + token_reward_t
    metrics = {
        "reward": total.mean(),
        "response_length": length.mean(),
        "ended": rollouts.ended.mean(dtype=jnp.float32),
    }
    if rollouts.ref_logp_t is not None:
        kl_t = kl_estimate(rollouts.old_logp_t, rollouts.ref_logp_t, config.kl_estimator)
        kl_t = jnp.where(mask_t, kl_t, 0.0)
        metrics["kl"] = kl_t.sum(axis=1).mean()
        if config.kl_in == "reward":
            r_t = r_t - hparams.kl_coef * kl_t
    return r_t, metrics | {"objective/shaped_reward": r_t.sum(axis=1).mean()}, stats

"""The update of TRL 1.12.0's PPOTrainer, to rounding: what `compat="trl"` puts in place of the default.

Every trap of that code which changes a number is reproduced, and none of them is in the default preset:

- The score is received one position after EOS when there is room, where no token stands; at EOS otherwise.
- Values and their loss include that position; it is 0 in the KL and has no policy loss.
- Advantages are whitened with the unbiased variance of each rank's own rows (`whiten_groups` ranks), not of the batch.
- Whitened rewards keep their mean and include the position after EOS.
- Log-probabilities of padding are set to 1, so that its ratio is 1; `policy/approxkl_avg`, `policy/entropy_avg` and
  `val/ratio` average over padding too, and `val/num_eos_tokens` counts fillers.
- Logits are divided by `temperature + 1e-7`.
- Policy and value loss are means over the tokens of a micro-batch, and micro-batches count alike, however many tokens
  they have.
- Gradients are not clipped, whatever its `max_grad_norm` says (a run with `compat: trl` must not set ours).
- Nothing bounds a ratio, no score is clipped or normalised, and the KL penalty stands in the reward.

Two more depend on how TRL's data loader and accelerate count, not on arrays, and are not reproduced:

- With `num_mini_batches` m > 1 and gradient accumulation a > 1, TRL takes one step for every a micro-batches across
  minibatch borders and averages its statistics over m a entries of which some are zero. Its numbers are those of
  `minibatches` 1 with `micro_batches` a, its statistics these times the share of entries that are filled.
- On the last rollout batch of a pass over the data, it takes a step after every micro-batch, each of a loss over a.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rapidfire_jax.algorithms.kl import kl_estimate
from rapidfire_jax.algorithms.masking import Mean, Metrics, PartialMetrics, Peak, masked_mean, whiten

if TYPE_CHECKING:
    from rapidfire_jax.algorithms.online import Rollouts
    from rapidfire_jax.algorithms.ppo import PPOBatch, PPOConfig, PPOHParams

TEMPERATURE_SHIFT = 1e-7
INVALID_LOGP = 1.0


class Targets(NamedTuple):
    """What TRL computes before its epochs."""

    old_logp_t: Float[Array, "B T"]
    ref_logp_t: Float[Array, "B T"]
    old_v_t: Float[Array, "B T"]
    value_mask_t: Bool[Array, "B T"]
    r_t: Float[Array, "B T"]
    adv_t: Float[Array, "B T"]
    return_t: Float[Array, "B T"]


# Settings that TRL does not have, and what they have to be.
WITHOUT = {
    "kl_in": "reward", "reward_normalization": "none", "aggregation": "token", "kl_target": None,
    "clip_range_high": None, "dual_clip": None, "entropy_coef": 0.0, "reward_clip": None, "overlong_penalty": 0.0,
    "target_kl": None, "importance_cap": None, "bootstrap_truncated": False, "whiten_advantages": True,
    "packing": False,
}  # fmt: skip


def objection(run: Any) -> str | None:
    """What of a run's configuration `compat: trl` cannot do, or nothing."""
    rl = run.rl
    if rl.compat is None:
        return None if rl.whiten_groups == 1 else f"rl.whiten_groups={rl.whiten_groups} has no effect without rl.compat"
    for name, value in WITHOUT.items():
        if (found := getattr(rl, name)) != value:
            return f"rl.compat=trl: TRL has no {name}={found}; leave it at {value}"
    if rl.kl_estimator not in ("k1", "k3"):
        return f"rl.compat=trl: TRL has no kl_estimator={rl.kl_estimator}; accepted: k1, k3"
    if rl.value_clip_range is None:
        return "rl.compat=trl: TRL always clips values; give rl.value_clip_range"
    if run.rollout.batch_size % rl.whiten_groups:
        return f"rollout.batch_size={run.rollout.batch_size} is not a multiple of rl.whiten_groups={rl.whiten_groups}"
    if run.optimizer.max_grad_norm is not None:
        return "rl.compat=trl: TRL never clips gradients; set optimizer.max_grad_norm=null"
    return None


def one_longer(mask_t: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """`mask_t` and the position after its last one."""
    return mask_t | jnp.pad(mask_t, ((0, 0), (1, 0)))[:, :-1]


def targets(rollouts: "Rollouts", hparams: "PPOHParams", config: "PPOConfig") -> tuple[Targets, Metrics]:
    """Rewards, advantages and returns, and the statistics of TRL's names that come from them."""
    assert rollouts.score is not None and rollouts.ref_logp_t is not None and rollouts.old_v_t is not None
    mask_t = rollouts.mask_t
    value_mask_t = one_longer(mask_t)
    old_logp_t, ref_logp_t = (jnp.where(mask_t, x, INVALID_LOGP) for x in (rollouts.old_logp_t, rollouts.ref_logp_t))
    v_t = jnp.where(value_mask_t, rollouts.old_v_t, 0.0)
    score = rollouts.score - hparams.missing_eos_penalty * (~rollouts.ended).astype(rollouts.score.dtype)
    kl_t = kl_estimate(old_logp_t, ref_logp_t, config.kl_estimator)
    penalty_t = -hparams.kl_coef * kl_t
    width, length = mask_t.shape[1], mask_t.sum(axis=1, keepdims=True, dtype=jnp.int32)
    received_at = jnp.arange(width, dtype=jnp.int32)[None] == jnp.minimum(length, width - 1)
    r_t = penalty_t + jnp.where(received_at, score[:, None], 0.0)
    if config.whiten_rewards:
        r_t = _whiten(r_t, value_mask_t, config.whiten_groups, keep_mean=True)
    adv_t = _gae(r_t, v_t, hparams)
    whitened = _whiten(adv_t, mask_t, config.whiten_groups)
    metrics = {
        "reward": rollouts.score.mean(),
        "kl": kl_t.sum(axis=1).mean(),
        "response_length": mask_t.sum(axis=1, dtype=jnp.float32).mean(),
        "ended": rollouts.ended.mean(dtype=jnp.float32),
        "objective/kl": kl_t.sum(axis=1).mean(),
        "objective/entropy": jnp.where(mask_t, -old_logp_t, 0.0).sum(axis=1).mean(),
        "objective/non_score_reward": penalty_t.sum(axis=1).mean(),
        "objective/rlhf_reward": penalty_t.sum(axis=1).mean() + score.mean(),
        "objective/scores": score.mean(),
    }
    if config.eos_id is not None:
        metrics["val/num_eos_tokens"] = (rollouts.tokens[:, -width:] == config.eos_id).sum(dtype=jnp.float32)
    return Targets(old_logp_t, ref_logp_t, v_t, value_mask_t, r_t, whitened, adv_t + v_t), metrics


def loss(
    outputs: Any, batch: "PPOBatch", hparams: "PPOHParams"
) -> tuple[Float[Array, ""], Float[Array, ""], PartialMetrics]:
    """TRL's loss of one micro-batch, with a count of 1: micro-batches are averaged alike.

    Gradients flow to `outputs.logp_t`, where `batch.mask_t`, and to `outputs.v_t`, there and one position later.
    """
    assert hparams.value_clip_range is not None
    mask_t, value_mask_t = batch.mask_t, one_longer(batch.mask_t)
    logp_t = jnp.where(mask_t, outputs.logp_t, INVALID_LOGP)
    v_t = jnp.where(value_mask_t, outputs.v_t, 0.0)
    clipped_v_t = jnp.clip(v_t, batch.old_v_t - hparams.value_clip_range, batch.old_v_t + hparams.value_clip_range)
    error_t, clipped_error_t = (v_t - batch.return_t) ** 2, (clipped_v_t - batch.return_t) ** 2
    value = 0.5 * masked_mean(jnp.maximum(error_t, clipped_error_t), value_mask_t)
    log_ratio = logp_t - batch.old_logp_t
    ratio = jnp.exp(log_ratio)
    free_t = -batch.adv_t * ratio
    clipped_t = -batch.adv_t * jnp.clip(ratio, 1.0 - hparams.clip_range, 1.0 + hparams.clip_range)
    policy = masked_mean(jnp.maximum(free_t, clipped_t), mask_t)

    one = jnp.ones((), policy.dtype)
    share = lambda hit, mask: masked_mean(hit.astype(policy.dtype), mask)  # noqa: E731
    averages = {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "policy/approxkl_avg": 0.5 * (log_ratio**2).mean(),
        "policy/clipfrac_avg": share(clipped_t > free_t, mask_t),
        "policy/entropy_avg": outputs.entropy_t.mean(),
        "val/clipfrac_avg": share(clipped_error_t > error_t, value_mask_t),
        "val/ratio": ratio.mean(),
        "policy/approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask_t),
        "policy/log_ratio": masked_mean(jnp.abs(log_ratio), mask_t),
    }
    metrics: PartialMetrics = {name: Mean(jax.lax.stop_gradient(value), one) for name, value in averages.items()}
    deviation = jnp.max(jnp.abs(jax.lax.stop_gradient(ratio) - 1.0))
    return policy + hparams.value_coef * value, one, metrics | {"policy/ratio_max_deviation": Peak(deviation)}


def _whiten(x: Float[Array, "B T"], mask: Bool[Array, "B T"], groups: int, keep_mean: bool = False):
    """Whitens the rows of each of `groups` ranks by themselves; 0 where `mask` is False."""
    if x.shape[0] % groups:
        raise ValueError(f"{x.shape[0]} rollouts cannot be cut into whiten_groups={groups} ranks")
    cut = (groups, x.shape[0] // groups, x.shape[1])
    return jax.vmap(functools.partial(whiten, keep_mean=keep_mean))(x.reshape(cut), mask.reshape(cut)).reshape(x.shape)


def _gae(r_t: Float[Array, "B T"], v_t: Float[Array, "B T"], hparams: "PPOHParams") -> Float[Array, "B T"]:
    """GAE over all columns, padding included: what stands there is 0, or the score that follows EOS."""
    next_v_t = jnp.pad(v_t, ((0, 0), (0, 1)))[:, 1:]
    delta_t = r_t + hparams.gamma * next_v_t - v_t

    def step(after, delta):
        adv = delta + hparams.gamma * hparams.lam * after
        return adv, adv

    _, adv_t = jax.lax.scan(step, jnp.zeros_like(delta_t[:, 0]), delta_t.T, reverse=True)
    return adv_t.T

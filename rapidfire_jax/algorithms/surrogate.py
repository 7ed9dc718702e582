"""Policy and value losses that the online algorithms are made of."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.ppo_loss.terms import Number, clipped_surrogate, cut_off, half_squared_error
from rapidfire_jax.algorithms.masking import Aggregation, aggregate

type RatioLevel = Literal["token", "sequence", "trajectory"]


def log_ratios(
    logp_t: Float[Array, "B T"],
    old_logp_t: Float[Array, "B T"],
    mask_t: Bool[Array, "B T"],
    level: RatioLevel = "token",
) -> Float[Array, "B T"]:
    """Logarithm of the importance ratio that each token is weighted by; 0 where `mask_t` is False.

        token       logp_t - old_logp_t                            PPO, GRPO
        sequence    mean of these over the tokens of the response   GSPO: the geometric mean of the token ratios
        trajectory  sum of these over the tokens of the response    RLOO: the ratio of the whole response

    References:
      Zheng et al., Group Sequence Policy Optimization, 2025, eq. 7.
    """
    difference = jnp.where(mask_t, logp_t - old_logp_t, 0.0)
    if level != "token":
        total = difference.sum(axis=1, keepdims=True)
        lengths = mask_t.sum(axis=1, keepdims=True, dtype=difference.dtype)
        of_response = total / jnp.maximum(lengths, 1.0) if level == "sequence" else total
        difference = jnp.where(mask_t, jnp.broadcast_to(of_response, mask_t.shape), 0.0)
    return cut_off(difference)


def policy_loss(
    logp_t: Float[Array, "B T"],
    old_logp_t: Float[Array, "B T"],
    adv_t: Float[Array, "B T"],
    mask_t: Bool[Array, "B T"],
    clip_range: Number,
    *,
    clip_range_high: Number | None = None,
    dual_clip: Number | None = None,
    importance_t: Float[Array, "B T"] | None = None,
    level: RatioLevel = "token",
    aggregation: Aggregation = "token",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Clipped surrogate as `(sum, count)`: of every token

        max(-adv ratio, -adv clip(ratio, 1 - clip_range, 1 + clip_range_high))

    and where `adv < 0`, with a dual clip c, at most `-adv c`.

    Args:
      logp_t: nats, of the policy being trained; the only input that gradients flow to.
      old_logp_t: nats, of the policy before the update.
      adv_t: advantages.
      mask_t: True on response tokens.
      clip_range, clip_range_high: below and above 1; None: the same.
      dual_clip: c > 1; None: off.
      importance_t: multiplies the loss of each token: probability before the update over that under the sampler.
      level: see `log_ratios`.
      aggregation: see `rapidfire_jax.algorithms.masking.aggregate`.

    References:
      Schulman et al., Proximal Policy Optimization Algorithms, 2017, eq. 7; Ye et al., Mastering Complex Control in
      MOBA Games, 2019, eq. 5 (dual clip); Yu et al., DAPO, 2025, sec. 3.1 (clip-higher).
    """
    old_logp_t, adv_t = jax.lax.stop_gradient((old_logp_t, adv_t))
    ratio = jnp.exp(log_ratios(logp_t, old_logp_t, mask_t, level))
    high = clip_range if clip_range_high is None else clip_range_high
    loss_t = clipped_surrogate(ratio, adv_t, 1.0 - clip_range, 1.0 + high, dual_clip)
    if importance_t is not None:
        loss_t = loss_t * jax.lax.stop_gradient(importance_t)
    return aggregate(loss_t, mask_t, aggregation)


def value_loss(
    v_t: Float[Array, "B T"],
    old_v_t: Float[Array, "B T"],
    return_t: Float[Array, "B T"],
    mask_t: Bool[Array, "B T"],
    value_clip_range: Number | None,
    *,
    aggregation: Aggregation = "token",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared error of the critic as `(sum, count)`: of every token

        0.5 max((v - R)^2, (clip(v, old_v - c, old_v + c) - R)^2)

    Args:
      v_t: values being trained; the only input that gradients flow to.
      old_v_t: values before the update.
      return_t: R.
      mask_t: True where values are trained.
      value_clip_range: c; None: only the first square.
      aggregation: see `rapidfire_jax.algorithms.masking.aggregate`.
    """
    old_v_t, return_t = jax.lax.stop_gradient((old_v_t, return_t))
    loss_t = half_squared_error(jnp.where(mask_t, v_t, 0.0), old_v_t, return_t, value_clip_range)
    return aggregate(loss_t, mask_t, aggregation)


def outside_clip(ratio: Float[Array, "B T"], clip_range: Number, clip_range_high: Number | None) -> Float[Array, "B T"]:
    """1 where the ratio has left the clip range, otherwise 0."""
    high = clip_range if clip_range_high is None else clip_range_high
    return ((ratio < 1.0 - clip_range) | (ratio > 1.0 + high)).astype(ratio.dtype)

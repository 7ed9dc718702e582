"""Plain truth for `ppo_loss`, and what XLA runs where the kernel cannot."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.ppo_loss.terms import KLEstimator, Number, clipped_surrogate, cut_off, half_squared_error, kl_of


class Trained(NamedTuple):
    """What gradients flow to."""

    logp: Float[Array, "*M"]
    entropy: Float[Array, "*M"]
    v: Float[Array, "*M"] | None


class Constants(NamedTuple):
    """Arrays that no gradient flows to."""

    mask: Bool[Array, "*M"]
    old_logp: Float[Array, "*M"]
    adv: Float[Array, "*M"]
    old_v: Float[Array, "*M"] | None
    returns: Float[Array, "*M"] | None
    ref_logp: Float[Array, "*M"] | None
    importance: Float[Array, "*M"] | None


class Numbers(NamedTuple):
    """Numbers that may change between calls without a new compilation; None switches off what they belong to."""

    clip_low: Number
    clip_high: Number
    dual_clip: Number | None
    value_clip: Number | None
    value_coef: Number
    entropy_coef: Number
    kl_coef: Number


class PPOLoss(NamedTuple):
    """Sums over the tokens where the mask is True, in the dtype of `logp_t`; `total / count` is the mean loss."""

    total: Float[Array, ""]  # policy + value_coef value - entropy_coef entropy + kl_coef kl
    count: Float[Array, ""]  # type: ignore[assignment]  # tokens
    policy: Float[Array, ""]  # clipped surrogate
    value: Float[Array, ""]  # half the squared error of the critic; 0 without values
    entropy: Float[Array, ""]  # nats
    kl: Float[Array, ""]  # nats, estimated; 0 without a reference
    approx_kl: Float[Array, ""]  # k3 of the policy before the update against the present one, nats
    clipped: Float[Array, ""]  # tokens whose ratio has left the clip range
    log_ratio: Float[Array, ""]  # absolute, nats
    ratio_deviation: Float[Array, ""]  # of a ratio from 1: the largest, not the sum


def assemble(sums: dict[str, Array], deviation: Array, numbers: Numbers) -> PPOLoss:
    """The result from the sums that a configuration has."""
    sums = {"value": jnp.zeros_like(deviation), "kl": jnp.zeros_like(deviation)} | sums
    total = sums["policy"] - numbers.entropy_coef * sums["entropy"]
    total = total + numbers.value_coef * sums["value"] + numbers.kl_coef * sums["kl"]
    return PPOLoss(total, ratio_deviation=deviation, **sums)


def ppo_loss_reference(trained: Trained, constants: Constants, numbers: Numbers, kl_estimator: KLEstimator) -> PPOLoss:
    """See `ppo_loss`."""
    constants, numbers = lax.stop_gradient((constants, numbers))
    mask, adv = constants.mask, constants.adv

    def masked(x):
        return jnp.where(mask, x, 0.0)

    log_ratio = cut_off(masked(trained.logp - constants.old_logp))
    ratio = jnp.exp(log_ratio)
    low, high = 1.0 - numbers.clip_low, 1.0 + numbers.clip_high
    policy = clipped_surrogate(ratio, adv, low, high, numbers.dual_clip)
    if constants.importance is not None:
        policy = policy * constants.importance
    terms = {
        "count": jnp.ones_like(ratio),
        "policy": policy,
        "entropy": trained.entropy,
        "approx_kl": jnp.expm1(log_ratio) - log_ratio,
        "clipped": ((ratio < low) | (ratio > high)).astype(ratio.dtype),
        "log_ratio": jnp.abs(log_ratio),
    }
    if trained.v is not None:
        assert constants.old_v is not None and constants.returns is not None
        terms["value"] = half_squared_error(masked(trained.v), constants.old_v, constants.returns, numbers.value_clip)
    if constants.ref_logp is not None:
        terms["kl"] = kl_of(masked(trained.logp - constants.ref_logp), kl_estimator)
    sums = {name: masked(term).sum() for name, term in terms.items()}
    loss = assemble(sums, jnp.abs(ratio - 1.0).max(), numbers)
    return PPOLoss(loss.total, *lax.stop_gradient(loss[1:]))

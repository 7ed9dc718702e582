"""Plain truth for `ppo_loss`, and what XLA runs where the kernel cannot."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

type KLEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"]
type Number = Float[Array, ""] | float

LARGEST_LOG_RATIO = 20.0  # nats; beyond it a ratio or a k3 is cut off and has no gradient


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

    log_ratio = jnp.clip(masked(trained.logp - constants.old_logp), -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    low, high = 1.0 - numbers.clip_low, 1.0 + numbers.clip_high
    policy = jnp.maximum(-adv * ratio, -adv * jnp.clip(ratio, low, high))
    if numbers.dual_clip is not None:
        policy = jnp.where(adv < 0.0, jnp.minimum(policy, -adv * numbers.dual_clip), policy)
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
        v = masked(trained.v)
        error = (v - constants.returns) ** 2
        if numbers.value_clip is not None:
            near = jnp.clip(v, constants.old_v - numbers.value_clip, constants.old_v + numbers.value_clip)
            error = jnp.maximum(error, (near - constants.returns) ** 2)
        terms["value"] = 0.5 * error
    if constants.ref_logp is not None:
        terms["kl"] = _kl(masked(trained.logp - constants.ref_logp), kl_estimator)
    sums = {name: masked(term).sum() for name, term in terms.items()}
    loss = assemble(sums, jnp.abs(ratio - 1.0).max(), numbers)
    return PPOLoss(loss.total, *lax.stop_gradient(loss[1:]))


def _kl(difference, estimator):
    name = estimator.removesuffix("+")
    if name == "k1":
        value = difference
    elif name == "k2":
        value = 0.5 * difference**2
    elif name == "k3":
        log_ratio = jnp.clip(-difference, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        value = jnp.expm1(log_ratio) - log_ratio
    else:
        value = jnp.abs(difference)
    if name == estimator:
        return value
    surrogate = 0.5 * difference**2
    return surrogate + lax.stop_gradient(value - surrogate)

"""The terms of a policy-gradient loss, token by token, and their gradients by autodiff."""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

type KLEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"]
type Number = Float[Array, ""] | float

LARGEST_LOG_RATIO = 20.0  # nats; beyond it a ratio is as good as infinite and has no gradient


def cut_off(log_ratio: Float[Array, "*M"]) -> Float[Array, "*M"]:
    """Within `LARGEST_LOG_RATIO` of 0."""
    return jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def clipped_surrogate(
    ratio: Float[Array, "*M"], adv: Float[Array, "*M"], low: Number, high: Number, dual_clip: Number | None
) -> Float[Array, "*M"]:
    """`max(-adv ratio, -adv clip(ratio, low, high))`, and where `adv < 0` at most `-adv dual_clip`."""
    loss = jnp.maximum(-adv * ratio, -adv * jnp.clip(ratio, low, high))
    return loss if dual_clip is None else jnp.where(adv < 0.0, jnp.minimum(loss, -adv * dual_clip), loss)


def half_squared_error(
    v: Float[Array, "*M"], old_v: Float[Array, "*M"], returns: Float[Array, "*M"], clip: Number | None
) -> Float[Array, "*M"]:
    """`0.5 max((v - returns)^2, (clip(v, old_v - clip, old_v + clip) - returns)^2)`; without clip, of the first."""
    square = (v - returns) ** 2
    if clip is not None:
        square = jnp.maximum(square, (jnp.clip(v, old_v - clip, old_v + clip) - returns) ** 2)
    return 0.5 * square


def check_estimator(estimator: str) -> None:
    """Raises ValueError if there is no such estimator."""
    if estimator not in (accepted := get_args(KLEstimator.__value__)):
        raise ValueError(f"kl_estimator={estimator!r}; accepted: {', '.join(accepted)}")


def kl_of(difference: Float[Array, "*M"], estimator: KLEstimator) -> Float[Array, "*M"]:
    """An estimate of the KL divergence from `logp - ref_logp` of drawn tokens, nats.

        k1: d    k2: d^2 / 2    k3: exp(-d) - 1 + d    abs: |d|

    With a "+", the value of the estimator and the gradient of k2.
    """
    check_estimator(estimator)
    name = estimator.removesuffix("+")
    if name == "k1":
        value = difference
    elif name == "k2":
        value = 0.5 * difference**2
    elif name == "k3":
        log_ratio = cut_off(-difference)
        value = jnp.expm1(log_ratio) - log_ratio
    else:
        value = jnp.abs(difference)
    if name == estimator:
        return value
    surrogate = 0.5 * difference**2
    return surrogate + lax.stop_gradient(value - surrogate)

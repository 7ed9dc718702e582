"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

type KLEstimator = Literal["k1", "k3"]


def kl_estimate(
    logp_t: Float[Array, "*S"], ref_logp_t: Float[Array, "*S"], estimator: KLEstimator
) -> Float[Array, "*S"]:
    """Per-token estimate in nats, unbiased when the tokens were drawn from the policy.

        k1 = logp - ref_logp
        k3 = exp(ref_logp - logp) - 1 - (ref_logp - logp)     (never negative, lower variance)

    References:
      Schulman, Approximating KL Divergence, 2020.
    """
    log_ratio = ref_logp_t - logp_t
    if estimator == "k1":
        return -log_ratio
    if estimator == "k3":
        return jnp.expm1(log_ratio) - log_ratio
    raise ValueError(f"kl estimator {estimator!r} is not known; accepted: k1, k3")

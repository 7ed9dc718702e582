"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens, and control of its coefficient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.ppo_loss.terms import KLEstimator, kl_of


def kl_estimate(
    logp_t: Float[Array, "*S"], ref_logp_t: Float[Array, "*S"], estimator: KLEstimator
) -> Float[Array, "*S"]:
    """Per-token estimate in nats, of tokens that were drawn from the policy.

        k1 = logp - ref_logp                                     unbiased
        k2 = (logp - ref_logp)^2 / 2                             biased, its gradient is not
        k3 = exp(ref_logp - logp) - 1 - (ref_logp - logp)        unbiased, never negative, lower variance
        abs = |logp - ref_logp|

    `k1+`, `k3+` and `abs+` have the value of the estimator named and the gradient of k2 ("straight through"): the
    expectation of k2's gradient is that of the KL divergence, whereas k1's is 0 and k3's is that of the reverse KL.
    Differences beyond 20 nats are cut off in k3, so that one token cannot make the sum infinite.

    Args:
      logp_t: of the policy; gradients flow to it.
      ref_logp_t: of the reference; a constant.

    References:
      Schulman, Approximating KL Divergence, 2020; Liu et al., Rethinking KL Regularization in RLHF, 2025.
    """
    return kl_of(logp_t - jax.lax.stop_gradient(ref_logp_t), estimator)


def adapt_kl_coef(
    kl_coef: Float[Array, ""],
    kl: Float[Array, ""],
    *,
    target: Float[Array, ""] | float,
    horizon: Float[Array, ""] | float,
    responses: int,
) -> Float[Array, ""]:
    """The next coefficient: raised while the KL is above its target, lowered while it is below.

        e = clip(kl / target - 1, -0.2, 0.2)
        kl_coef' = kl_coef (1 + e min(responses / horizon, 1))

    Args:
      kl_coef: the present coefficient.
      kl: measured with it, nats a response.
      target: wanted, nats a response.
      horizon: responses after which the coefficient may have changed by a factor of about e^0.2.
      responses: how many `kl` was measured on.

    References:
      Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, sec. 2.2; its K_beta is
      responses / horizon.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * jnp.minimum(responses / horizon, 1.0))

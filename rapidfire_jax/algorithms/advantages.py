"""Advantage estimators."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gae(
    r_t: Float[Array, "B T"],
    v_t: Float[Array, "B T"],
    mask_t: Bool[Array, "B T"],
    gamma: Float[Array, ""] | float,
    lam: Float[Array, ""] | float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation.

        delta_t = r_t + gamma v_{t+1} - v_t
        adv_t = delta_t + gamma lam adv_{t+1}

    where t+1 is the next position with `mask_t` True, and both `v` and `adv` are 0 after the last one.

    Args:
      r_t: reward received for token t.
      v_t: critic's value of the state before token t.
      mask_t: True on the tokens of the response; whatever stands at other positions has no effect.
      gamma, lam: discount and trace decay, in [0, 1].

    Returns:
      `(adv_t, return_t)`, float32, with `return_t = adv_t + v_t`; 0 where `mask_t` is False. No gradient is stopped.

    References:
      Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation, 2015, eq. 16.
    """

    def step(carry, inputs):
        next_adv, next_v = carry
        r, v, mask = inputs
        adv = r + gamma * next_v - v + gamma * lam * next_adv
        return (jnp.where(mask, adv, next_adv), jnp.where(mask, v, next_v)), adv

    zeros = jnp.zeros(r_t.shape[0], jnp.float32)
    time_first = (r_t.T.astype(jnp.float32), v_t.T.astype(jnp.float32), mask_t.T)
    _, adv_t = jax.lax.scan(step, (zeros, zeros), time_first, reverse=True)
    adv_t = jnp.where(mask_t, adv_t.T, 0.0)
    return adv_t, jnp.where(mask_t, adv_t + v_t, 0.0)

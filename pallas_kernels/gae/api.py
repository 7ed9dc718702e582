"""Generalised advantage estimation over the positions where a mask is True."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import Implementation, Operation, hopper_kernel
from pallas_kernels.gae import mosaic_gpu
from pallas_kernels.gae.reference import gae_associative_scan, gae_scan


class Advantages(NamedTuple):
    """Both 0 where the mask is False; float32, or float64 if rewards or values are."""

    adv_t: Float[Array, "B T"]
    return_t: Float[Array, "B T"]  # adv_t + v_t


def gae(
    r_t: Float[Array, "B T"],
    v_t: Float[Array, "B T"],
    mask_t: Bool[Array, "B T"],
    gamma: Float[Array, ""] | float,
    lam: Float[Array, ""] | float,
    next_v: Float[Array, " B"] | None = None,
    *,
    implementation: str | None = None,
) -> Advantages:
    """Generalised advantage estimation.

        delta_t = r_t + gamma v_{t+1} - v_t
        adv_t = delta_t + gamma lam adv_{t+1}

    where t+1 is the next position with `mask_t` True. After the last one `adv` is 0 and `v` is `next_v`.

    Args:
      r_t: reward received for token t; integers become float32.
      v_t: critic's value of the state before token t.
      mask_t: True on the tokens of the response; whatever stands at other positions has no effect.
      gamma, lam: discount and trace decay, in [0, 1]; traced or not.
      next_v: value of the state after the last token: 0 for a response that ended, the critic's estimate to bootstrap
        from for one that was cut off. None: 0 throughout.
      implementation: "mosaic_gpu", "scan", "associative_scan", or None for the first of them that can serve the call.

    Gradients flow to `r_t`, `v_t`, `gamma`, `lam` and `next_v`; those of the kernel are those of "scan".

    Raises:
      ValueError: shapes that do not belong together, an unknown implementation.
      NotImplementedError: the named implementation cannot serve the call; all reasons.

    References:
      Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation, 2015, eq. 16.
    """
    if r_t.ndim != 2 or not r_t.shape == v_t.shape == mask_t.shape:
        raise ValueError(f"r_t {r_t.shape}, v_t {v_t.shape} and mask_t {mask_t.shape} do not fit [B, T] each")
    if mask_t.dtype != jnp.bool:
        raise ValueError(f"mask_t is {mask_t.dtype}; accepted: bool")
    if next_v is not None and next_v.shape != r_t.shape[:1]:
        raise ValueError(f"next_v {next_v.shape} does not fit r_t {r_t.shape}: one value a row, [B]")
    dtype = jnp.float64 if jnp.float64 in (r_t.dtype, v_t.dtype) else jnp.float32
    gamma, lam = jnp.asarray(gamma, dtype), jnp.asarray(lam, dtype)
    next_v = jnp.zeros(r_t.shape[0], dtype) if next_v is None else next_v.astype(dtype)
    v = v_t.astype(dtype)
    adv = OPERATION(implementation, r_t.astype(dtype), v, mask_t, gamma, lam, next_v)
    return Advantages(jnp.where(mask_t, adv, 0), jnp.where(mask_t, adv + v, 0))


_mosaic = jax.custom_vjp(mosaic_gpu.gae_forward)
_mosaic.defvjp(
    lambda *args: (mosaic_gpu.gae_forward(*args), args), lambda args, cotangent: jax.vjp(gae_scan, *args)[1](cotangent)
)

OPERATION = Operation(
    "gae",
    {
        "mosaic_gpu": hopper_kernel(_mosaic, mosaic_gpu.reasons),
        "scan": Implementation(gae_scan),
        "associative_scan": Implementation(gae_associative_scan),
    },
)

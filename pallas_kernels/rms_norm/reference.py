"""Plain truth for `rms_norm`, and what XLA runs where the kernel cannot."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def rms_norm_reference(x, residual, scale, eps, offset):
    """`(y, h)` of `x [M, D]`, `residual [M, D]` or None and `scale [D]`; statistics in float32."""
    h = x if residual is None else checkpoint_name(x + residual, "residual")
    h32 = h.astype(jnp.float32)
    unit = h32 * jax.lax.rsqrt(jnp.mean(h32 * h32, axis=-1, keepdims=True) + eps)
    if offset:
        weight = scale.astype(jnp.float32)[None] + offset
        return (unit * jnp.broadcast_to(weight, x.shape)).astype(x.dtype), h
    return unit.astype(x.dtype) * jnp.broadcast_to(scale.astype(x.dtype)[None], x.shape), h

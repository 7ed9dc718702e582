"""Sums, means and whitening over the positions where a mask is True."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked_sum(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(sum, count)` of `x` where `mask`; what stands elsewhere, NaN included, has no effect."""
    return jnp.where(mask, x, 0.0).sum(), mask.sum(dtype=jnp.float32)


def masked_mean(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, ""]:
    """Mean of `x` where `mask`; 0 where the mask is empty."""
    total, count = masked_sum(x, mask)
    return total / jnp.maximum(count, 1.0)


def masked_variance(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, ""]:
    """Unbiased variance of `x` where `mask`; 0 for fewer than two positions."""
    centred = jnp.where(mask, x - masked_mean(x, mask), 0.0)
    return jnp.sum(centred * centred) / jnp.maximum(mask.sum(dtype=jnp.float32) - 1.0, 1.0)


def whiten(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, "*S"]:
    """Shifts and scales `x` to mean 0 and variance 1 over `mask`; 0 elsewhere."""
    scale = jax.lax.rsqrt(masked_variance(x, mask) + 1e-8)
    return jnp.where(mask, (x - masked_mean(x, mask)) * scale, 0.0)

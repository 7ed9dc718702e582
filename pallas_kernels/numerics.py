"""Small functions that kernels of several operations compute with."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LOG2E = math.log2(math.e)  # kernels use powers of 2, which the hardware has
LOWEST = -1e30  # stands for minus infinity, of which differences are NaN


def tanh(x: jax.Array) -> jax.Array:
    """From 2^x and 1/sqrt(x), whose approximations on the GPU are good to 22 bits; that of tanh is to 11."""
    root = lax.rsqrt(1.0 + jnp.exp2(x * (2 * LOG2E)))
    return 1.0 - 2.0 * root * root


def over_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number a row, repeated along it."""
    return lax.broadcast_in_dim(x, shape, (0,))


def over_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number a column, repeated along it."""
    return lax.broadcast_in_dim(x, shape, (1,))


def padded(x: jax.Array, multiple: int, axis: int = 0) -> jax.Array:
    """`x` with zeros behind one axis, up to a multiple."""
    missing = -x.shape[axis] % multiple
    widths: list[Any] = [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x

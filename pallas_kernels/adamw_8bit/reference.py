"""Plain truth for `adamw_8bit`: the arithmetic of whole blocks, which the kernel runs too, and the call that XLA runs.

Codes are square roots of what they stand for, so that neither direction needs a table. With the largest of a block s,

    m       = s sign(c) (c / 127)^2      c in [-127, 127], rounded to nearest
    sqrt(v) = s (c / 255)^2              c in [1, 255], rounded stochastically

The steps are 1.6% and 0.8% of the largest and get relatively wider from there. The smallest sqrt(v) is 1.5e-5 of the
largest and never 0, which would divide an update by eps. A step of the optimiser moves v by 1 - b2 of itself, less than
one code: nearest codes would stand still, stochastic ones move at the right rate on average. m moves by 1 - b1, enough
for nearest codes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8, UInt32

from pallas_kernels import hopper
from pallas_kernels.numerics import over_rows

BLOCK = 256  # elements that share a scale
PORTION = 4096  # blocks that a CPU updates at a time, with temporaries of some 20 MB however large the array
SMALLEST = 2.0**-90  # scale, so that its reciprocal is finite


class Moments(NamedTuple):
    """Exponential averages of gradients (m) and of their squares (v): 2 bytes an element and 8 a block."""

    m_codes: Int8[Array, "*M"]
    m_scales: Float[Array, " blocks"]  # float32, of |m|
    v_codes: UInt8[Array, "*M"]
    v_scales: Float[Array, " blocks"]  # float32, of sqrt(v)


class Numbers(NamedTuple):
    """Scalars of one step, float32."""

    b1: Float[Array, ""]
    b2: Float[Array, ""]
    rate: Float[Array, ""]  # learning rate / (1 - b1^step)
    root_factor: Float[Array, ""]  # 1 / sqrt(1 - b2^step)
    eps: Float[Array, ""]
    shrink: Float[Array, ""]  # 1 - learning rate x weight decay


def update_blocks(param, grad, moments: Moments, numbers: Numbers, seed, first_row, stochastic: bool):
    """One step of `[rows, 256]` elements whose first has index `256 first_row`; scales are `[rows]`."""
    p, g = param.astype(jnp.float32), grad.astype(jnp.float32)
    m, root_v = decode_m(moments.m_codes, moments.m_scales), decode_root_v(moments.v_codes, moments.v_scales)
    m = numbers.b1 * m + (1.0 - numbers.b1) * g
    root_v = jnp.sqrt(numbers.b2 * (root_v * root_v) + (1.0 - numbers.b2) * (g * g))
    p = numbers.shrink * p - numbers.rate * m * (1.0 / (root_v * numbers.root_factor + numbers.eps))
    bits = random_bits(p.shape, seed, first_row)
    if stochastic:
        p = round_to_bfloat16(p, bits >> 16)
    updated = Moments(*encode_m(m), *encode_root_v(root_v, bits & 0x7FFF))
    return p.astype(param.dtype), updated


def decode_m(codes, scales):
    """Values of signed codes."""
    c = codes.astype(jnp.float32)
    return c * jnp.abs(c) * over_rows(scales * (1 / 127**2), c.shape)


def encode_m(m):
    """Codes and scales."""
    scales = jnp.maximum(jnp.max(jnp.abs(m), axis=1), SMALLEST)
    root = jnp.sqrt(jnp.abs(m) * over_rows(127**2 / scales, m.shape))
    # Truncation rounds positive numbers down. (Of a float's bits, XLA 0.11.2 for GPUs makes other integers at times.)
    return ((jnp.where(m < 0.0, -root, root) + 128.5).astype(jnp.int32) - 128).astype(jnp.int8), scales


def decode_root_v(codes, scales):
    """Values of unsigned codes."""
    c = codes.astype(jnp.float32)
    return c * c * over_rows(scales * (1 / 255**2), c.shape)


def encode_root_v(root_v, bits):
    """Codes, rounded by 15 random bits each, and scales."""
    scales = jnp.maximum(jnp.max(root_v, axis=1), SMALLEST)
    root = jnp.sqrt(root_v * over_rows(255**2 / scales, root_v.shape))
    # A float32 from 256 on has 8 bits before the point and 15 behind it, which the random ones may carry over.
    fixed = jnp.minimum(jnp.maximum(root, 1.0), 255.0) + 256.0
    return ((lax.bitcast_convert_type(fixed, jnp.uint32) + bits) >> 15).astype(jnp.uint8), scales


def round_to_bfloat16(x, bits):
    """Float32 numbers that are bfloat16 numbers: up with the probability of what is cut off, by 16 random bits each."""
    pattern = lax.bitcast_convert_type(x, jnp.uint32) + bits
    rounded = lax.bitcast_convert_type(pattern & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(x == x, rounded, x)  # the bits of a NaN may overflow


def random_bits(shape, seed, first_row) -> UInt32[Array, "rows 256"]:
    """32 bits an element: a hash of `seed` and of the element's index modulo 2^32."""
    row = lax.broadcasted_iota(jnp.uint32, shape, 0) + first_row.astype(jnp.uint32)
    return mix(row * BLOCK + lax.broadcasted_iota(jnp.uint32, shape, 1) + seed)


def mix(x):
    """A bijection of 32-bit words in which every bit depends on every other (Wellons's lowbias32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def adamw_8bit_reference(param, grad, moments: Moments, numbers: Numbers, seed, stochastic: bool):
    """`(param, moments)` of any shape; the last block is filled up with zeros."""
    if param.size == 0:
        return param, moments

    def blocks(x):
        flat = x.reshape(-1)
        return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)

    def back(x):
        return x.reshape(-1)[: param.size].reshape(param.shape)

    def step(first, rows, state):
        (p, before), g = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, rows), (state, gradients))
        updated = update_blocks(p, g, before, numbers, seed, first, stochastic)
        return jax.tree.map(lambda x, new: lax.dynamic_update_slice_in_dim(x, new, first, 0), state, updated)

    gradients = blocks(grad)
    state = blocks(param), moments._replace(m_codes=blocks(moments.m_codes), v_codes=blocks(moments.v_codes))
    rows = len(gradients)
    portion = min(PORTION, rows) if hopper.device_kind() == "cpu" else rows
    whole, rest = divmod(rows, portion)
    state = lax.fori_loop(0, whole, lambda i, state: step(i * portion, portion, state), state)
    new, updated = step(jnp.asarray(whole * portion), rest, state) if rest else state
    return back(new), updated._replace(m_codes=back(updated.m_codes), v_codes=back(updated.v_codes))

"""Weights of 8 or 4 bits: how they are rounded, stored and restored.

    int8   w = code scale                one float32 scale an output
    int4   w = (code - 8) scale          one scale a group of 64 inputs; codes 1..15, so -7..7, rounded to nearest even
    nf4    w = CODEBOOK[code] scale      the same groups; 16 quantiles of the normal distribution

The scales of groups are stored in 8 bits. With `s = scale - offset`, where `offset` is the mean of a matrix's scales,

    scale = DYNAMIC_MAP[code of s] block_scale + offset

and `block_scale` is the largest |s| of 256 scales that follow each other in row-major order [N, K/64]. It is stored
once for each run of groups that share it within a row, so that rows and groups can be taken apart.

4-bit codes lie as the kernel reads them, groups first: byte 8 t + j of a group holds elements 8 j + 2 t (low half) and
8 j + 2 t + 1, which is what thread t of four feeds to wgmma.

Reference: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

FORMATS = ("int8", "int4", "nf4")
GROUP = 64  # inputs that share a scale
BLOCK = 256  # scales that share a scale of their own


def _normal_float() -> np.ndarray:
    """Quantiles of the normal distribution, 7 negative, 0, and 8 positive ones, scaled to [-1, 1]."""
    negative = [1.0, 0.6961928009986877, 0.5250730514526367, 0.39491748809814453]
    negative += [0.28444138169288635, 0.18477343022823334, 0.09105003625154495]
    positive = [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    positive += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    return np.array([*(-x for x in negative), 0.0, *positive], np.float32)


def _dynamic_map() -> np.ndarray:
    """256 numbers: in each of 7 decades below 1 the midpoints of 1, 2, 4, ... 64 equal steps, both signs; 0 and 1."""
    positive = []
    for exponent in range(7):
        steps = 2**exponent
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(steps))
        index = np.arange(steps + 1)
        edges = np.where(index <= steps // 2, np.float32(0.1) + step * index, 1 - step * (steps - index))
        edges = edges.astype(np.float32)  # each computed from the nearer end
        positive.append(np.float32(10.0 ** (exponent - 6)) * (edges[:-1] + edges[1:]) / np.float32(2))
    magnitudes = np.concatenate(positive)
    return np.sort(np.concatenate([-magnitudes, magnitudes, np.array([0, 1], np.float32)]))


def _map_thresholds(values: np.ndarray) -> np.ndarray:
    """Least float32 numbers in [-1, 1] of each code but the first, found by bisection.

    A number is put on the nearest of 65,536 equidistant points first, and that gets the nearest code.
    """
    midpoints = (values[:-1].astype(np.float64) + values[1:]) / 2
    of_point = np.searchsorted(midpoints, np.arange(65536) / 32767.5 - 1, side="right")

    def code(x: np.ndarray) -> np.ndarray:
        return of_point[np.floor((x + np.float32(1)) * np.float32(32767.5) + np.float32(0.5)).astype(int)]

    low, high = values[:-1].copy(), values[1:].copy()
    wanted = np.arange(1, len(values))
    while (np.nextafter(low, high) < high).any():
        middle = np.where(np.nextafter(low, high) < high, (low + high) / np.float32(2), high)
        reached = code(middle) >= wanted
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return high


CODEBOOKS = {"int4": np.arange(-8, 8, dtype=np.float32), "nf4": _normal_float()}
DYNAMIC_MAP = _dynamic_map()
NF4_THRESHOLDS = np.nextafter((CODEBOOKS["nf4"][:-1] + CODEBOOKS["nf4"][1:]) / 2, np.float32(2))
MAP_THRESHOLDS = _map_thresholds(DYNAMIC_MAP)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "block_scale", "offset"],
    meta_fields=["format"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix [N, K], outputs first, or a stack of them: every array may have the same leading axes.

    Slicing, scanning and mapping over the leading axes are those of the arrays.
    """

    codes: Int8[Array, "*L N K"] | UInt8[Array, "*L K/64 N 32"]
    scale: Float[Array, "*L N"] | UInt8[Array, "*L K/64 N"]
    block_scale: Float[Array, "*L R N"] | None  # of runs of groups; 4 bits only
    offset: Float[Array, "*L"] | None  # 4 bits only
    format: str  # of FORMATS

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that is represented, `(*L, N, K)`."""
        if self.format == "int8":
            return self.codes.shape
        *lead, groups, n, _ = self.codes.shape
        return (*lead, n, groups * GROUP)

    @property
    def run(self) -> int:
        """Groups of a row that share a block scale: group g has `block_scale[g // run]`. 4 bits only."""
        assert self.block_scale is not None
        return self.scale.shape[-2] // self.block_scale.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def quantize(w: Float[Array, "*L N K"], format: str) -> Quantized:
    """Rounds matrices to a format; each is quantised on its own. K must be a multiple of 64 for 4 bits.

    Args:
      w: weights, outputs first.
      format: "int8", "int4" or "nf4".

    Raises:
      ValueError: an unknown format, a shape that does not fit.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; accepted: {', '.join(map(repr, FORMATS))}")
    if w.ndim < 2 or (format != "int8" and w.shape[-1] % GROUP):
        raise ValueError(f"w {w.shape} does not fit [*L, N, K] with K a multiple of {GROUP}")
    one = _to_int8 if format == "int8" else partial(_to_4_bits, format=format)
    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    return one(w)


def from_row_major(
    codes: UInt8[Array, "N K"],
    scale_codes: UInt8[Array, "N K/64"],
    block_scales: Float[Array, " N*K/64/256"],
    offset: Float[Array, ""],
    format: str,
) -> Quantized:
    """A 4-bit matrix whose codes and scales another program has computed and stored in row-major order."""
    packed = _pack(codes.reshape(*scale_codes.shape, GROUP))
    return Quantized(packed, scale_codes.T, _by_run(block_scales, *scale_codes.shape), offset, format)


def dequantize(q: Quantized, dtype: DTypeLike = jnp.float32) -> Float[Array, "*L N K"]:
    """The matrix that is represented, computed in float32 and rounded once."""
    if q.format == "int8":
        return (q.codes.astype(jnp.float32) * _last(q.scale, q.codes.shape)).astype(dtype)
    grouped = jnp.asarray(CODEBOOKS[q.format])[unpack(q)].reshape(*q.shape[:-1], -1, GROUP)
    scale = jnp.swapaxes(group_scales(q), -1, -2)
    return (grouped * _last(scale, grouped.shape)).reshape(q.shape).astype(dtype)


def unpack(q: Quantized) -> UInt8[Array, "*L N K"]:
    """Codes one a byte: 0..15 for 4 bits, code + 128 for int8."""
    if q.format == "int8":
        return lax.bitcast_convert_type(q.codes, jnp.uint8) ^ jnp.uint8(128)
    pairs = jnp.stack([q.codes & jnp.uint8(15), q.codes >> jnp.uint8(4)], axis=-1)
    *lead, groups, n, _, _ = pairs.shape
    threads = jnp.swapaxes(pairs.reshape(*lead, groups, n, 4, 8, 2), -2, -3)
    return jnp.swapaxes(threads.reshape(*lead, groups, n, GROUP), -2, -3).reshape(q.shape)


def group_scales(q: Quantized) -> Float[Array, "*L K/64 N"]:
    """The scales of groups in float32."""
    assert q.block_scale is not None and q.offset is not None
    block = jnp.repeat(q.block_scale, q.run, axis=-2)
    offset = lax.broadcast_in_dim(q.offset, q.scale.shape, range(q.offset.ndim))
    return jnp.asarray(DYNAMIC_MAP)[q.scale] * block + offset


def _last(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` with a new last axis, repeated along it."""
    return lax.broadcast_in_dim(x, shape, range(x.ndim))


def _to_int8(w: jax.Array) -> Quantized:
    w = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=-1) / 127
    codes = jnp.round(w / _last(jnp.where(scale == 0, 1, scale), w.shape)).astype(jnp.int8)
    return Quantized(codes, scale, None, None, "int8")


def _to_4_bits(w: jax.Array, format: str) -> Quantized:
    grouped = w.astype(jnp.float32).reshape(w.shape[0], -1, GROUP)
    largest = jnp.max(jnp.abs(grouped), axis=-1)
    if format == "nf4":
        unit = jnp.clip(grouped * _last(1 / jnp.where(largest == 0, 1, largest), grouped.shape), -1, 1)
        codes = sum((unit >= t).astype(jnp.uint8) for t in NF4_THRESHOLDS)
        scale = largest
    else:
        scale = largest / 7
        unit = grouped / _last(jnp.where(scale == 0, 1, scale), grouped.shape)
        codes = (jnp.round(unit) + 8).astype(jnp.uint8)
    offset = jnp.mean(scale)
    return Quantized(_pack(codes), *_compress(scale - offset), offset, format)


def _pack(codes: jax.Array) -> jax.Array:
    """[K/64, N, 32] bytes of codes [N, K/64, 64]."""
    n, groups, _ = codes.shape
    threads = codes.reshape(n, groups, 8, 4, 2).transpose(1, 0, 3, 2, 4)
    return (threads[..., 0] | threads[..., 1] << jnp.uint8(4)).reshape(groups, n, 32)


def _compress(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes [K/64, N] and block scales [R, N] of centred scales [N, K/64]."""
    n, groups = s.shape
    flat = jnp.pad(s.reshape(-1), (0, -s.size % BLOCK)).reshape(-1, BLOCK)
    largest = jnp.max(jnp.abs(flat), axis=-1)
    unit = jnp.where(_last(largest, flat.shape) == 0, -1.0, flat * _last(1 / largest, flat.shape))
    codes = jnp.searchsorted(jnp.asarray(MAP_THRESHOLDS), unit, side="right").astype(jnp.uint8)
    return codes.reshape(-1)[: s.size].reshape(n, groups).T, _by_run(largest, n, groups)


def _by_run(block_scales: jax.Array, n: int, groups: int) -> jax.Array:
    """[R, N] of the scales of blocks, which are runs of 256 groups in row-major order."""
    run = math.gcd(groups, BLOCK)  # groups of a row that always share a block
    return jnp.repeat(block_scales, BLOCK // run)[: n * groups // run].reshape(n, groups // run).T

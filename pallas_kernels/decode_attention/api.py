"""Attention of one new token a row over a key/value cache, which may be quantised to int8."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels.decode_attention import mosaic_gpu
from pallas_kernels.decode_attention.reference import decode_attention_reference
from pallas_kernels.dispatch import Implementation, Operation, hopper_kernel


def decode_attention(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K C H"] | Int8[Array, "B K C H"],
    values: Float[Array, "B K C H"] | Int8[Array, "B K C H"],
    ends: Int[Array, " B"],
    *,
    starts: Int[Array, " B"] | None = None,
    key_scales: Float[Array, "B K C"] | None = None,
    value_scales: Float[Array, "B K C"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N H"]:
    """`softmax(q K^T * scale) V` over the slots `starts[b] <= c < ends[b]` of row b's cache; softmax in float32.

    Equivalent to

        keys, values = keys * key_scales[..., None], values * value_scales[..., None]   for an int8 cache
        scores = einsum("bkgh,bkch->bkgc", q.reshape(B, K, N // K, H), keys) * scale
        scores = soft_cap * tanh(scores / soft_cap)                                     with a soft cap
        scores = where((starts[b] <= c) & (c < ends[b]), scores, -inf)
        out = einsum("bkgc,bkch->bkgh", softmax(scores), values).reshape(B, N, H)

    Args:
      q: the queries of one position a row; N is a multiple of K, and N / K neighbours share a head of the cache.
      keys: cache in the dtype of `q`, or int8 codes from `quantize_cache`. Slots that no row sees must be finite too.
      values: like `keys`.
      ends: one past the last slot that a row sees. A row that sees none gets 0.
      starts: first slot that a row sees, 0 by default; behind left padding or at the edge of a sliding window, there
        perhaps below 0.
      key_scales: float32, one a token and head; with an int8 cache only.
      value_scales: like `key_scales`.
      scale: of the scores; `H ** -0.5` by default.
      soft_cap: bounds the scores (Gemma 2).
      implementation: "mosaic_gpu", "xla", or None for the first of them that can serve the call.

    Returns:
      The attended values in the dtype of `q`.

    No gradient flows.

    Raises:
      ValueError: shapes or dtypes that do not belong together, an unknown implementation.
      NotImplementedError: the named implementation cannot serve the call; all reasons.

    Reference: Dao et al., Flash-Decoding for long-context inference, 2023; Ainslie et al., GQA, 2023.
    """
    starts = jnp.zeros_like(ends) if starts is None else starts
    _check(q, keys, values, ends, starts, key_scales, value_scales)
    operands = (q, keys, values, starts.astype(jnp.int32), ends.astype(jnp.int32), key_scales, value_scales)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return OPERATION(implementation, *jax.lax.stop_gradient(operands), scale, soft_cap)


def quantize_cache(x: Float[Array, "*M H"]) -> tuple[Int8[Array, "*M H"], Float[Array, "*M"]]:
    """Symmetric int8 codes of vectors and a float32 scale for each: `x ~ codes * scales[..., None]`.

    `scales = max|x| / 127` over a vector; codes are `x / scale` rounded to the nearest integer, halves to the even one.
    So no number is off by more than half a scale. A vector of zeros has scale 0 and codes 0.

    Args:
      x: keys or values, heads apart.

    Returns:
      Codes from -127 to 127, and scales.
    """
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(axis=-1) / 127
    codes = jnp.round(x / jnp.where(scales == 0, 1.0, scales)[..., None])
    return jnp.clip(codes, -127, 127).astype(jnp.int8), scales


def _check(q, keys, values, ends, starts, key_scales, value_scales):
    shapes = f"q {q.shape}, keys {keys.shape}, values {values.shape}"
    if q.ndim != 3 or keys.ndim != 4 or keys.shape != values.shape:
        raise ValueError(f"{shapes} do not fit [B, N, H], [B, K, C, H], [B, K, C, H]")
    if (q.shape[0], q.shape[2]) != (keys.shape[0], keys.shape[3]) or q.shape[1] % keys.shape[1]:
        raise ValueError(f"{shapes} do not fit [B, N, H], [B, K, C, H], [B, K, C, H] with N a multiple of K")
    for name, x in (("ends", ends), ("starts", starts)):
        if x.shape != q.shape[:1] or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} {x.dtype}{x.shape} is not an integer for each of {q.shape[0]} rows")
    if keys.dtype != values.dtype or keys.dtype not in (q.dtype, jnp.int8):
        raise ValueError(f"keys {keys.dtype} and values {values.dtype}; accepted: both {q.dtype} as q, or both int8")
    wanted = (keys.shape[:3], jnp.float32) if keys.dtype == jnp.int8 else None
    for name, x in (("key_scales", key_scales), ("value_scales", value_scales)):
        if (None if x is None else (x.shape, x.dtype)) != wanted:
            given = "None" if x is None else f"{x.dtype}{x.shape}"
            accepted = "None" if wanted is None else f"float32{wanted[0]}"
            raise ValueError(f"{name}={given} with a cache of {keys.dtype}; accepted: {accepted}")


OPERATION = Operation(
    "decode_attention",
    {
        "mosaic_gpu": hopper_kernel(mosaic_gpu.decode_attention_forward, mosaic_gpu.reasons),
        "xla": Implementation(decode_attention_reference),
    },
)

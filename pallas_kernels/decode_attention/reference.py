"""Plain truth for `decode_attention`, and what XLA runs where the kernel cannot."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper


def decode_attention_reference(q, keys, values, starts, ends, key_scales, value_scales, scale, soft_cap):
    """`[B, N, H]` in the dtype of `q`; softmax in float32."""
    B, N, H = q.shape
    _, K, C, _ = keys.shape
    grouped = q.reshape(B, K, N // K, H)
    one_row = N == K and hopper.device_kind() == "cpu"
    if one_row and q.dtype == jnp.bfloat16:
        grouped = jnp.repeat(grouped, 2, axis=2)  # a single row XLA would multiply with a float32 copy of the cache
    scores = jnp.einsum("bkgh,bkch->bkgc", grouped, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    scores *= scale
    if key_scales is not None:
        scores *= _by_head(key_scales, scores.shape)
    if soft_cap is not None:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    slot = lax.broadcasted_iota(jnp.int32, (B, C), 1)
    visible = (slot >= starts[:, None]) & (slot < ends[:, None])
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if value_scales is not None:
        weights *= _by_head(value_scales, weights.shape)
    if one_row and q.dtype == jnp.float32:  # as a product, it has one thread
        out = (weights[..., None] * values.astype(q.dtype)[:, :, None]).sum(axis=-2)
    else:
        out = jnp.einsum("bkgc,bkch->bkgh", weights.astype(q.dtype), values.astype(q.dtype))[:, :, : N // K]
    return jnp.where(visible.any(axis=1)[:, None, None], out.reshape(B, N, H), jnp.zeros((), q.dtype))


def _by_head(scales, shape):
    """`[B, K, C]` to the scores' `[B, K, G, C]`."""
    return lax.broadcast_in_dim(scales, shape, (0, 1, 3))

"""Causal attention by XLA without most of what causality hides: a strip of queries at a time.

The backward pass has the probabilities once more from lse, like the kernels' (see `mosaic_gpu_vjp`), so that nothing is
kept that has queries and keys.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from pallas_kernels.flash_attention.reference import scores_of, visible

AT_LEAST, AT_MOST = 48, 8  # queries of a strip, and strips; measured on two AVX-512 cores


class Strip(NamedTuple):
    """Some queries, and the keys among which are all that they see."""

    queries: slice
    keys: slice
    seen: Bool[Array, "#B 1 1 queries keys"]


def cut(S, C, segments, kv_segments, window) -> list[Strip]:
    """Strips without the keys after all of the queries and those that their window, if known while tracing, is past."""
    assert S == C
    count = min(max(S // AT_LEAST, 1), AT_MOST)
    size = -(-S // (16 * count)) * 16
    strips = []
    for start in range(0, S, size):
        stop = min(start + size, S)
        first = max(start - window + 1, 0) if isinstance(window, int) else 0
        queries, keys = slice(start, stop), slice(first, stop)
        own = None if segments is None else segments[:, queries]
        others = None if kv_segments is None else kv_segments[:, keys]
        seen = visible(stop - start, stop - first, own, others, window, True, start - first)
        strips.append(Strip(queries, keys, seen[:, None, None]))
    return strips


def flash_attention_forward(q, k, v, strips: list[Strip], causal, scale, soft_cap):
    """`(out, lse)` of the reference."""
    assert causal
    parts = []
    for queries, keys, seen in strips:
        scores, _ = _capped(scores_of(q[:, queries], k[:, keys], scale), soft_cap)
        scores = jnp.where(seen, scores, -jnp.inf)
        highest = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        lse = jnp.where(total > 0, highest + jnp.log(total), -jnp.inf)
        products = jnp.einsum(
            "bkgsc,bckh->bkgsh", weights.astype(v.dtype), v[:, keys], preferred_element_type=jnp.float32
        )
        out = products / jnp.where(total > 0, total, 1.0)
        parts.append((jnp.moveaxis(out, 3, 1).astype(v.dtype), lse[..., 0]))
    out, lse = (jnp.concatenate(part, axis) for part, axis in zip(zip(*parts, strict=True), (1, 3), strict=True))
    return out.reshape(q.shape), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def flash_attention_backward(q, k, v, out, lse, dout, dlse, strips: list[Strip], causal, scale, soft_cap):
    """Gradients of `q`, `k` and `v`."""
    assert causal
    B, S, N, _ = q.shape
    K = k.shape[2]
    # Tied to a cotangent, or XLA would keep the scores of the forward pass for their copies here.
    q, dout = lax.optimization_barrier((q, dout))
    delta = jnp.einsum("bsnh,bsnh->bns", out, dout, preferred_element_type=jnp.float32) - dlse
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # a query that sees no key has p = 0
    lse, delta = (x.reshape(B, K, N // K, S, 1) for x in (lse, delta))
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for queries, keys, seen in strips:
        scores, slope = _capped(scores_of(q[:, queries], k[:, keys], scale), soft_cap)
        p = jnp.exp(jnp.where(seen, scores, -jnp.inf) - lse[:, :, :, queries])
        dp = scores_of(dout[:, queries], v[:, keys], 1.0)
        ds = (p * (dp - delta[:, :, :, queries]) * (scale * slope)).astype(q.dtype)
        dq.append(jnp.einsum("bkgsc,bckh->bskgh", ds, k[:, keys]))
        dk += _of_keys(ds, q[:, queries], keys, S)
        dv += _of_keys(p.astype(q.dtype), dout[:, queries], keys, S)
    return jnp.concatenate(dq, axis=1).reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype)


def reasons(q, k, v, segments, kv_segments, window, causal, scale, soft_cap) -> list[str]:
    """Reasons against strips: which keys they may leave out is not known."""
    S, C = q.shape[1], k.shape[1]
    return ([] if causal else ["a query may see every key"]) + ([] if S == C else [f"{S} queries and {C} keys"])


def _capped(scores, soft_cap):
    """Scores under a soft cap, and its derivative."""
    if soft_cap is None:
        return scores, 1.0
    bent = jnp.tanh(scores / soft_cap)
    return bent * soft_cap, 1 - bent * bent


def _of_keys(weights, x, keys: slice, length: int):
    """Sums over a strip's queries for each key, [B, length, K, H] in float32, 0 outside of `keys`."""
    B, K, G, s, _ = weights.shape
    grouped = x.reshape(B, s, K, G, x.shape[-1])
    sums = jnp.einsum("bkgsc,bskgh->bckh", weights, grouped, preferred_element_type=jnp.float32)
    return jnp.pad(sums, ((0, 0), (keys.start, length - keys.stop), (0, 0), (0, 0)))

"""Plain truth for `flash_attention`, and what XLA runs where neither kernels nor strips can."""

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def flash_attention_reference(q, k, v, segments, kv_segments, window, causal, scale, soft_cap):
    """`(out [B, S, N, H], lse [B, N, S])`; softmax in float32, queries that see no key get 0 and -inf."""
    seen = visible(q.shape[1], k.shape[1], segments, kv_segments, window, causal)
    scores = scores_of(q, k, scale)
    if soft_cap is not None:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    highest = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    sees = total > 0
    total = jnp.where(sees, total, 1.0)
    lse = jnp.where(sees, highest + jnp.log(total), -jnp.inf)
    out = jnp.einsum("bkgsc,bckh->bskgh", (weights / total).astype(v.dtype), v)
    return checkpoint_name(out.reshape(q.shape), "attention_out"), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def scores_of(q, k, scale):
    """Scaled products `[B, K, N // K, S, C]`, float32."""
    B, S, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, S, K, N // K, H)
    return jnp.einsum("bskgh,bckh->bkgsc", grouped, k, preferred_element_type=jnp.float32) * scale


def visible(S, C, segments, kv_segments, window, causal, first=0):
    """Which keys a query sees, bool [B or 1, S, C]; the first query stands at the key of index `first`."""
    ahead = first + jnp.arange(S, dtype=jnp.int32)[:, None] - jnp.arange(C, dtype=jnp.int32)[None, :]
    seen = jnp.ones((1, S, C), bool)
    if causal:
        seen &= (ahead >= 0)[None]
    if window is not None:
        seen &= (ahead < window)[None]
    if segments is not None:
        seen &= (segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments != 0)[:, None, :]
    return seen

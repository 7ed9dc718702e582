"""Plain truth for `flash_attention`, and what XLA runs where the kernel cannot."""

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def flash_attention_reference(q, k, v, segments, kv_segments, window, causal, scale, soft_cap):
    """`(out [B, S, N, H], lse [B, N, S])`; softmax in float32, queries that see no key get 0 and -inf."""
    seen = visible(q.shape[1], k.shape[1], segments, kv_segments, window, causal)
    scores = checkpoint_name(_scores(q, k, scale), "attention_scores")
    out, lse = _mixed(scores, v, seen, soft_cap)
    return checkpoint_name(out, "attention_out"), lse


STRIPS = 4  # of queries


def flash_attention_in_strips(q, k, v, segments, kv_segments, window, causal, scale, soft_cap):
    """The same; a strip of queries leaves out the keys that come after all of it, or that its window is past."""
    S = q.shape[1]
    size = -(-S // (16 * STRIPS)) * 16
    parts = []
    for start in range(0, S, size):
        stop = min(start + size, S)
        first = max(start - window + 1, 0) if isinstance(window, int) else 0
        queries, keys = slice(start, stop), slice(first, stop)
        own = None if segments is None else segments[:, queries]
        others = None if kv_segments is None else kv_segments[:, keys]
        seen = visible(stop - start, stop - first, own, others, window, causal, start - first)
        parts.append(_mixed(_scores(q[:, queries], k[:, keys], scale), v[:, keys], seen, soft_cap))
    out, lse = (jnp.concatenate(part, axis) for part, axis in zip(zip(*parts, strict=True), (1, 2), strict=True))
    return checkpoint_name(out, "attention_out"), lse


def why_no_strips(q, k, v, segments, kv_segments, window, causal, scale, soft_cap) -> list[str]:
    """Reasons against strips: they would leave nothing out, or too little."""
    S, C = q.shape[1], k.shape[1]
    reasons = [] if causal else ["a query may see every key"]
    reasons += [] if S == C else [f"{S} queries and {C} keys"]
    return reasons + ([] if S >= 32 * STRIPS else [f"{S} queries are fewer than {32 * STRIPS}"])


def _scores(q, k, scale):
    B, S, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, S, K, N // K, H)
    return jnp.einsum("bskgh,bckh->bkgsc", grouped, k, preferred_element_type=jnp.float32) * scale


def _mixed(scores, v, seen, soft_cap):
    """Values by the softmax of the scores `[B, K, N // K, S, C]` that are seen, and its logarithm."""
    B, K, G, S, _ = scores.shape
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
    return out.reshape(B, S, K * G, v.shape[-1]), lse.reshape(B, K * G, S)


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

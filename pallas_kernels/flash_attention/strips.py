"""Causal attention by XLA without most of what causality hides: the reference, a strip of queries at a time."""

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.flash_attention.reference import mixed, scores_of, visible

STRIPS = 4  # of queries


def flash_attention_in_strips(q, k, v, segments, kv_segments, window, causal, scale, soft_cap):
    """`(out, lse)` of the reference; a strip leaves out the keys after all of it, and those that its window is past."""
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
        parts.append(mixed(scores_of(q[:, queries], k[:, keys], scale), v[:, keys], seen, soft_cap))
    out, lse = (jnp.concatenate(part, axis) for part, axis in zip(zip(*parts, strict=True), (1, 2), strict=True))
    return checkpoint_name(out, "attention_out"), lse


def reasons(q, k, v, segments, kv_segments, window, causal, scale, soft_cap) -> list[str]:
    """Reasons against strips: they would leave nothing out, or too little."""
    S, C = q.shape[1], k.shape[1]
    found = [] if causal else ["a query may see every key"]
    found += [] if S == C else [f"{S} queries and {C} keys"]
    return found + ([] if S >= 32 * STRIPS else [f"{S} queries are fewer than {32 * STRIPS}"])

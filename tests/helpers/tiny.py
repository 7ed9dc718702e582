"""A decoder small enough to run in milliseconds."""

import jax
import jax.numpy as jnp
from flax import nnx

from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.heads import CausalLM

TINY = DecoderConfig(
    vocab_size=67, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8,
    max_positions=128,
)  # fmt: skip


def tiny_model(seed: int = 0, **changes) -> CausalLM:
    """Random weights, large enough that logits differ clearly from one another."""
    import dataclasses

    model = CausalLM(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(seed))
    graphdef, weights = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda w: w * 6 if w.ndim > 1 and jnp.std(w) > 0 else w, weights))


def padded_batch(lengths: list[int], width: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Random left-padded token ids `[B, width]` and their mask."""
    tokens = jax.random.randint(jax.random.key(seed), (len(lengths), width), 3, TINY.vocab_size)
    mask = jnp.arange(width)[None] >= width - jnp.asarray(lengths)[:, None]
    return jnp.where(mask, tokens, 0), mask

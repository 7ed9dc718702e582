"""Calls of `flash_attention` in real models."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import mosaic_gpu
from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.shape_specs import BATCH, LENGTH, MODELS, Call, Cost, forward_and_backward, nbytes, shape

ROWS, LONG = 4, 4096  # of packed rows


def calls(model: str) -> list[Call]:
    """Attention of a training step over padded sequences, and over long packed rows."""
    return [
        _call(f"padded, {model}", model, BATCH, LENGTH),
        _call(f"packed, {model}", model, ROWS, LONG),
    ]


def _call(name: str, model: str, batch: int, length: int) -> Call:
    sizes = MODELS[model]
    H, group = sizes.head_dim, sizes.heads // sizes.kv_heads
    q, k = shape(batch, length, sizes.heads, H), shape(batch, length, sizes.kv_heads, H)
    segments = shape(batch, length, dtype=jnp.int32)
    statistics = shape(batch, sizes.heads, length, dtype=jnp.float32)
    product = batch * sizes.heads * length**2 * H  # operations of one product, half of it being masked
    queries, keys, rows = nbytes(q), nbytes(k), nbytes(statistics)
    tile = mosaic_gpu.ROWS * mosaic_gpu.WARPGROUPS
    passes = length / tile / 2  # over a streamed array
    costs = {
        "flash_attention_forward": Cost(
            2 * product, 2 * queries + 2 * keys + rows, 2 * queries + 2 * keys * group * passes + rows
        ),
        "flash_attention_backward_dq": Cost(
            3 * product, 3 * queries + 2 * keys + 2 * rows, 3 * queries + 2 * keys * group * passes + 2 * rows
        ),
        "flash_attention_backward_dkv": Cost(
            4 * product, 2 * queries + 4 * keys + 2 * rows, (2 * queries + 2 * rows) * passes + 4 * keys
        ),
    }
    args = (q, k, k, segments)

    def draw(key):
        """Full rows: what the costs count."""
        keys = jax.random.split(key, 3)
        tensors = (jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, args[:3], strict=True))
        return *tensors, jnp.ones_like(segments)

    return Call(name, forward_and_backward(_segmented, 0, 1, 2), args, costs, draw)


def _segmented(q, k, v, segments):
    return flash_attention(q, k, v, segments=segments)

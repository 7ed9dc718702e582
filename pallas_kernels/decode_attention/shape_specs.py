"""Calls of `decode_attention` in real models."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.api import decode_attention, quantize_cache
from pallas_kernels.decode_attention.mosaic_gpu import heuristic
from pallas_kernels.shape_specs import LENGTH, MODELS, Call, Cost, nbytes, shape

ROWS = 64  # responses sampled at once; twice as many over an int8 cache


def calls(model: str) -> list[Call]:
    """The last step of a rollout, when every row sees the whole cache."""
    _, heads, kv_heads, width, _, _ = MODELS[model]

    def call(name, rows, dtype):
        q, cache = shape(rows, heads, width), shape(rows, kv_heads, LENGTH, width, dtype=dtype)
        scales = shape(rows, kv_heads, LENGTH, dtype=jnp.float32)
        args = (q, cache, cache) + (scales, scales) * (dtype == jnp.int8)
        splits = heuristic(rows, LENGTH, kv_heads, width, dtype).splits
        shares = 4 * rows * kv_heads * splits * 8 * (width + 2)  # float32, up to 8 query heads
        flops = 4 * rows * heads * LENGTH * width
        costs = {
            "decode_attention_forward": Cost(flops, nbytes(*args), nbytes(*args) + shares),
            "decode_attention_combine": Cost(0, nbytes(q) + shares, nbytes(q) + shares),
        }

        def draw(key):
            q_key, *keys = jax.random.split(key, 3)
            full = [jax.random.normal(key, cache.shape, q.dtype) for key in keys]
            if dtype == jnp.int8:
                (k, k_scales), (v, v_scales) = map(quantize_cache, full)
                full = [k, v, k_scales, v_scales]
            return jax.random.normal(q_key, q.shape, q.dtype), *full

        return Call(f"{name}, {model}", _over_the_whole_cache, args, costs, draw)

    return [call("decoding", ROWS, jnp.bfloat16), call("decoding over int8", 2 * ROWS, jnp.int8)]


def _over_the_whole_cache(q, keys, values, key_scales=None, value_scales=None):
    ends = jnp.full(q.shape[:1], keys.shape[2], jnp.int32)
    return decode_attention(q, keys, values, ends, key_scales=key_scales, value_scales=value_scales)

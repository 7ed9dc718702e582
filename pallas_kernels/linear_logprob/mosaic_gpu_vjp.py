"""Backward kernel of `linear_logprob`: the gradient of the logits of one slice of the vocabulary, in half precision.

The logits are computed again, tile by tile, as in the forward kernel. With l = z - lse in units of log2, a row has
three numbers for all its columns:

    dz = 2^l (a - b l) + c [column is the target],
    a = (dlse - dlogp - dentropy entropy) / temperature,   b = ln 2 dentropy / temperature,   c = dlogp / temperature,

times 1 - tanh^2 under a soft cap. XLA's matrix products make the gradients of hidden and head from each slice.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles
from pallas_kernels.linear_logprob.chunked import gradients
from pallas_kernels.linear_logprob.mosaic_gpu import (
    ROWS,
    SWIZZLED,
    WARPGROUP_ROWS,
    WARPGROUPS,
    columns_like,
    heuristic,
    load_rows,
    over_logits,
)
from pallas_kernels.numerics import LOG2E, over_rows, padded, tanh
from pallas_kernels.tuning import config_for

SLICE_BYTES = 64 * 2**20  # of gradients of logits held at a time
STORED = 64  # columns that leave shared memory together


def columns_held(chunk: int | None, rows: int, vocabulary: int) -> int:
    """Columns of a slice: what the caller asked for, else what `SLICE_BYTES` hold, in whole tiles."""
    return min(max(256, SLICE_BYTES // (2 * rows) // 256 * 256) if chunk is None else chunk, vocabulary)


def linear_logprob_backward(hidden, head, targets, temperature, results, cotangents, chunk, soft_cap, *, frozen):
    """Gradients of hidden and head, the latter None if the head is `frozen`."""
    (m, d), v = hidden.shape, head.shape[0]
    chunk = columns_held(chunk, m, v)
    config = config_for("linear_logprob_backward", heuristic(m, chunk), m=m, d=d, v=chunk, dtype=hidden.dtype)
    _, entropy, lse = results
    d_logp, d_entropy, d_lse = cotangents
    row_terms = [lse * LOG2E, d_lse - d_logp - d_entropy * entropy, d_entropy / LOG2E, d_logp]
    row_terms = [row_terms[0], *(x / temperature for x in row_terms[1:])]
    targets, *row_terms = (padded(x, ROWS * config.group) for x in (targets.astype(jnp.int32), *row_terms))
    rows_padded = padded(hidden, SWIZZLED[0])
    scale = ((LOG2E if soft_cap is None else LOG2E * soft_cap) / temperature).reshape(1)

    def per_block(rows, targets_ref, scale_ref, lse_ref, a_ref, b_ref, c_ref, out_ref, out_smem):
        target, scale = load_rows(targets_ref, rows), scale_ref[0]
        lse, a, b, c = (load_rows(ref, rows) for ref in (lse_ref, a_ref, b_ref, c_ref))
        slots = out_smem.at[jax.lax.axis_index("warpgroup")]

        def consume(first, z, carry):
            t = None if soft_cap is None else tanh(z * (1 / soft_cap))
            own_lse, own_target, own_a, own_b, own_c = (over_rows(x, z.shape) for x in (lse, target - first, a, b, c))
            below = (z if t is None else t) * scale - own_lse
            hit = columns_like(z) == own_target
            d_z = jnp.exp2(below) * (own_a - own_b * below) + jnp.where(hit, own_c, 0.0)
            if t is not None:
                d_z *= 1.0 - t * t
            d_z = d_z.astype(out_ref.dtype)
            for i, column in enumerate(range(0, config.columns, STORED)):
                slot = slots.at[i % slot_count]
                plgpu.wait_smem_to_gmem(slot_count - 1, wait_read_only=True)
                slot[...] = d_z[:, column : column + STORED]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(slot, out_ref.at[rows, pl.ds(first + column, STORED)])
            return carry

        return (), consume, lambda _: plgpu.wait_smem_to_gmem(0)

    slot_count = min(2, config.columns // STORED)
    out_smem = tiles.tile((WARPGROUPS, slot_count, WARPGROUP_ROWS, STORED), hidden.dtype)

    def gradient(start, rows):
        rows = padded(rows, SWIZZLED[1])
        d_z = over_logits(
            "linear_logprob_backward",
            per_block,
            rows_padded,
            rows,
            (targets - start, scale, *row_terms),
            config,
            jax.ShapeDtypeStruct((rows_padded.shape[0], rows.shape[0]), hidden.dtype),
            (out_smem,),
        )
        return d_z[:m, :chunk]

    return gradients(gradient, hidden, head, chunk, frozen=frozen)

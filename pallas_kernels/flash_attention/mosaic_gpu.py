"""Forward kernel of `flash_attention`.

A block takes 128 queries of a head, 64 in each of two warpgroups; a third warpgroup streams tiles of keys and values
through a ring in shared memory. With z = s log2(e), s the scaled and capped scores, and m the running maximum of z,

    p = 2^(z - m_new)    l <- l 2^(m - m_new) + sum p    acc <- acc 2^(m - m_new) + p V

and in the end out = acc / l, lse = (m + log2 l) / log2(e). The two take turns: while one has the tensor cores, the
other computes its exponentials. Blocks stay and take one item (head, batch row, tile of queries) after the other, the
longest first.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles
from pallas_kernels.flash_attention import visibility
from pallas_kernels.flash_attention.blocks import (
    COMPUTE_REGISTERS,
    ROWS,
    WARPGROUPS,
    items,
    persistent,
    resident,
    ring,
    row_of,
    stage_of,
    stream_keys,
    tuning_key,
    unless_all_seen,
)
from pallas_kernels.numerics import LOG2E, LOWEST, over_rows, tanh
from pallas_kernels.tuning import choice, config_for

DTYPES = (jnp.bfloat16, jnp.float16)
WIDTHS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    block_kv: int = choice(64, 128)  # keys of a tile
    slots: int = choice(2, 3, 4)  # of the ring


def heuristic(head_dim: int) -> Config:
    """Wide tiles while two of them fit beside the accumulator in registers."""
    return Config(block_kv=64, slots=2) if head_dim == 256 else Config(block_kv=128, slots=2)


def reasons(q, k, v, segments, kv_segments, window, causal, scale, soft_cap) -> list[str]:
    """Why the kernels cannot serve a call."""
    found = []
    if q.dtype not in DTYPES:
        found.append(f"dtype {q.dtype}; accepted: bfloat16, float16")
    if q.shape[-1] not in WIDTHS:
        found.append(f"head width {q.shape[-1]}; accepted: {', '.join(map(str, WIDTHS))}")
    return found


def flash_attention_forward(q, k, v, seen: visibility.Visibility, causal, scale, soft_cap):
    """`(out [B, S, N, H], lse [B, N, padded S])`; lse is -inf where a query sees no key."""
    B, S, N, H = q.shape
    K = k.shape[2]
    config = config_for("flash_attention_forward", heuristic(H), **tuning_key(q, k, causal, soft_cap))
    block_kv, slots = config.block_kv, config.slots
    rows = WARPGROUPS * ROWS
    query_tiles = pl.cdiv(S, rows)
    ranges, _ = visibility.tile_ranges(seen, causal, rows, block_kv)
    in_place = H == 256  # the result leaves through the tile of the queries: there is no room for one of its own

    def body(q_ref, k_ref, v_ref, ranges_ref, window_ref, queries_ref, keys_ref, out_ref, lse_ref, *scratch):
        stay, out_tile, lse_tile, k_ring, v_ring, turn, stage = scratch
        (q_tile, query_tile), (k_tile, key_tile), (v_tile,) = stay.tiles, k_ring.tiles, v_ring.tiles
        warpgroup = lax.axis_index("warpgroup")
        every_item = partial(items, (query_tiles, B, N), ranges_ref, descending=causal)

        @pl.when(warpgroup == WARPGROUPS)
        def _memory():
            def sources(batch, head, queries):
                return q_ref.at[batch, queries, head], queries_ref.at[row_of(queries_ref, batch), :, queries]

            stream_keys(every_item, stay, sources, k_ring, v_ring, (k_ref, v_ref, keys_ref), block_kv, N // K)

        @pl.when(warpgroup < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            queries, seen_by, lse_out = q_tile.at[warpgroup], query_tile.at[warpgroup], lse_tile.at[warpgroup]
            out = queries if in_place else out_tile.at[warpgroup]

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def visit(item, step, tile, batch, head, ranges):
                start, stop = ranges[:2]
                query = tile * rows + warpgroup * ROWS

                def attend(i, carry):
                    acc, m, total = carry
                    slot = k_ring.slot(step + i - start)
                    plgpu.barrier_wait(k_ring.full.at[slot])

                    def scores(ref):
                        plgpu.wgmma(ref, queries, k_tile.at[slot].transpose((1, 0)))
                        take_turns()
                        return ref[...]

                    z = pl.run_scoped(scores, plgpu.ACC((ROWS, block_kv), jnp.float32))
                    if soft_cap is not None:
                        z = soft_cap * LOG2E * tanh(z * (scale / soft_cap))

                    def masked(z):
                        z = visibility.hide(z, causal, window_ref[0], seen_by, key_tile.at[slot], 0)
                        plgpu.commit_smem()  # before the slot is filled again
                        return z

                    z = unless_all_seen(i, ranges, masked, z)
                    plgpu.barrier_arrive(k_ring.empty.at[slot])
                    factor = 1.0 if soft_cap is not None else scale * LOG2E
                    m_new = jnp.maximum(m, z.max(axis=1) * factor)
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(z * factor - over_rows(m_new, z.shape))
                    acc *= over_rows(alpha, acc.shape)
                    total = total * alpha + p.sum(axis=1)
                    p = p.astype(q.dtype)
                    plgpu.barrier_wait(v_ring.full.at[slot])
                    take_turns()
                    acc = tiles.accumulate(acc, p, v_tile.at[slot], stage_of(stage, warpgroup))
                    plgpu.barrier_arrive(v_ring.empty.at[slot])
                    return acc, m_new, total

                plgpu.barrier_wait(stay.full.at[warpgroup])
                pl.when(warpgroup == 1)(take_turns)
                empty = (
                    plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA),
                    plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), plgpu.Layout.WGMMA.reduce(1)),
                    plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1)),
                )
                acc, m, total = lax.fori_loop(start, stop, attend, empty)
                pl.when(warpgroup == 0)(take_turns)
                if not in_place:
                    plgpu.barrier_arrive(stay.empty.at[warpgroup])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                sees = total > 0
                total = jnp.where(sees, total, 1.0)
                out[...] = (acc * over_rows(1 / total, acc.shape)).astype(q.dtype)
                lse_out[...] = jnp.where(sees, (m + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, out_ref.at[batch, pl.ds(query, ROWS), head])
                plgpu.copy_smem_to_gmem(lse_out, lse_ref.at[batch, head, pl.ds(query, ROWS)])
                if in_place:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(stay.empty.at[warpgroup])

            every_item(visit)
            plgpu.wait_smem_to_gmem(0)

    q_tiles = tiles.tile((WARPGROUPS, ROWS, H), q.dtype)
    k_tiles = tiles.tile((slots, block_kv, H), q.dtype)
    return persistent(
        "flash_attention_forward",
        body,
        query_tiles * B * N,
        [q, jax.ShapeDtypeStruct((B, N, visibility.padded_length(S)), jnp.float32)],
        [
            resident(q_tiles, plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.int32)),
            None if in_place else q_tiles,
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            ring(slots, k_tiles, plgpu.SMEM((slots, 2, block_kv), jnp.int32)),
            ring(slots, k_tiles),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            tiles.staging((WARPGROUPS, ROWS, block_kv), q.dtype),
        ],
    )(q, k, v, ranges, seen.window, seen.queries, seen.keys)

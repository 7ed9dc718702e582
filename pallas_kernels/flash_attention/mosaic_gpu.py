"""Forward kernel of `flash_attention`.

A block takes 128 queries of a head, 64 in each of two warpgroups; a third warpgroup streams tiles of keys and values
through a ring in shared memory. With z = s log2(e), s the scaled and capped scores, and m the running maximum of z,

    p = 2^(z - m_new)    l <- l 2^(m - m_new) + sum p    acc <- acc 2^(m - m_new) + p V

and in the end out = acc / l, lse = (m + log2 l) / log2(e). The two take turns: while one has the tensor cores, the
other computes its exponentials. Blocks stay and take one item (head, batch row, tile of queries) after the other, the
longest first.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, tiles
from pallas_kernels.flash_attention import visibility
from pallas_kernels.tuning import choice, config_for

DTYPES = (jnp.bfloat16, jnp.float16)
WIDTHS = (64, 128, 256)
ROWS = 64  # of a warpgroup's tile
WARPGROUPS = 2  # that compute
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
LOG2E = math.log2(math.e)
LOWEST = -1e30  # below every score


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


class Ring(NamedTuple):
    """Slots of shared memory that the memory warpgroup fills and the others empty."""

    tiles: tuple[Any, ...]  # references, each [slots, ...]
    full: Any
    empty: Any

    def fill(self, step, *sources) -> None:
        """Copies a slice of device memory to each tile of the slot of `step`, once that is empty."""
        slot = self.slot(step)
        pl.when(step >= self.full.shape[0])(lambda: plgpu.barrier_wait(self.empty.at[slot]))
        for source, target in zip(sources, self.tiles, strict=True):
            plgpu.copy_gmem_to_smem(source, target.at[slot], self.full.at[slot])

    def drain(self, steps) -> None:
        """Waits until all slots are empty again after `steps` fills."""

        @pl.loop(jnp.maximum(steps - self.full.shape[0], 0), steps)
        def _(step):
            plgpu.barrier_wait(self.empty.at[self.slot(step)])

    def slot(self, step):
        """Where the tiles of a step lie."""
        return lax.rem(step, self.full.shape[0])


def ring(slots: int, *tiles: Any) -> Ring:
    """Scratch of a ring."""
    return Ring(
        tiles,
        plgpu.Barrier(num_arrivals=len(tiles), num_barriers=slots),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
    )


def items(grid: tuple[int, int, int], ranges_ref, visit, *, descending: bool, group: int = 1):
    """In a kernel: loops over the items of this block, a tile of a head of a batch row each.

    Args:
      grid: how many tiles, batch rows and heads there are.
      ranges_ref: of `visibility.tile_ranges`.
      visit: is called with the number of the item, the steps before it, tile, batch row, head and the tile's ranges.
      descending: whether the last tile, which causality gives the most to do, comes first.
      group: steps for each tile to visit.

    Returns:
      The steps of all items.
    """

    @plgpu.nd_loop(grid, collective_axes="core", init_carry=jnp.int32(0))
    def steps(loop, carry):
        tile, batch, head = loop.index
        tile = grid[0] - 1 - tile if descending else tile
        ranges = [ranges_ref[row_of(ranges_ref, batch), tile, i] for i in range(4)]
        visit(loop.local_index, carry, tile, batch, head, ranges)
        return carry + (ranges[1] - ranges[0]) * group

    return steps


def row_of(ref, batch):
    """The row of an operand that may be the same for every sequence."""
    return batch if ref.shape[0] > 1 else 0


def stage_of(stage, warpgroup):
    """A warpgroup's part of `tiles.staging`."""
    return None if stage is None else stage.at[warpgroup]


def tanh(x):
    """Exact to float32, where the hardware's own is to 11 bits."""
    return 1 - 2 / (jnp.exp2(x * (2 * LOG2E)) + 1)


def flash_attention_forward(q, k, v, seen: visibility.Visibility, causal, scale, soft_cap):
    """`(out [B, S, N, H], lse [B, N, padded S])`; lse is -inf where a query sees no key."""
    B, S, N, H = q.shape
    C, K = k.shape[1:3]
    key = {"b": B, "s": S, "n": N, "c": C, "k": K, "h": H, "dtype": q.dtype, "causal": causal}
    config = config_for("flash_attention_forward", heuristic(H), **key)
    block_kv, slots = config.block_kv, config.slots
    rows = WARPGROUPS * ROWS
    query_tiles = pl.cdiv(S, rows)
    ranges, _ = visibility.tile_ranges(seen, causal, rows, block_kv)
    in_place = H == 256  # the result leaves through the tile of the queries: there is no room for one of its own

    def body(q_ref, k_ref, v_ref, ranges_ref, window_ref, queries_ref, keys_ref, out_ref, lse_ref, *scratch):
        q_tile, query_tile, q_full, q_empty, out_tile, lse_tile, k_ring, v_ring, turn, stage = scratch
        (k_tile, key_tile), (v_tile,) = k_ring.tiles, v_ring.tiles
        warpgroup = lax.axis_index("warpgroup")

        every_item = partial(items, (query_tiles, B, N), ranges_ref, descending=causal)

        @pl.when(warpgroup == WARPGROUPS)
        def _memory():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def visit(item, step, tile, batch, head, ranges):
                for w in range(WARPGROUPS):
                    pl.when(item > 0)(lambda w=w: plgpu.barrier_wait(q_empty.at[w]))
                    queries = pl.ds(tile * rows + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_ref.at[batch, queries, head], q_tile.at[w], q_full.at[w])
                    seen_by = queries_ref.at[row_of(queries_ref, batch), :, queries]
                    plgpu.copy_gmem_to_smem(seen_by, query_tile.at[w], q_full.at[w])

                @pl.loop(*ranges[:2])
                def _(i):
                    at, keys, kv_head = step + i - ranges[0], pl.ds(i * block_kv, block_kv), lax.div(head, N // K)
                    k_ring.fill(at, k_ref.at[batch, keys, kv_head], keys_ref.at[row_of(keys_ref, batch), :, keys])
                    v_ring.fill(at, v_ref.at[batch, keys, kv_head])

            steps = every_item(visit)
            for w in range(WARPGROUPS):
                plgpu.barrier_wait(q_empty.at[w])
            k_ring.drain(steps)
            v_ring.drain(steps)

        @pl.when(warpgroup < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            queries, seen_by, lse_out = q_tile.at[warpgroup], query_tile.at[warpgroup], lse_tile.at[warpgroup]
            out = queries if in_place else out_tile.at[warpgroup]

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def visit(item, step, tile, batch, head, ranges):
                start, stop, full_start, full_stop = ranges
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

                    z = lax.cond((full_start <= i) & (i < full_stop), lambda z: z, masked, z)
                    plgpu.barrier_arrive(k_ring.empty.at[slot])
                    factor = 1.0 if soft_cap is not None else scale * LOG2E
                    m_new = jnp.maximum(m, z.max(axis=1) * factor)
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(z * factor - lax.broadcast_in_dim(m_new, z.shape, (0,)))
                    acc *= lax.broadcast_in_dim(alpha, acc.shape, (0,))
                    total = total * alpha + p.sum(axis=1)
                    p = p.astype(q.dtype)
                    plgpu.barrier_wait(v_ring.full.at[slot])
                    take_turns()
                    acc = tiles.accumulate(acc, p, v_tile.at[slot], stage_of(stage, warpgroup))
                    plgpu.barrier_arrive(v_ring.empty.at[slot])
                    return acc, m_new, total

                plgpu.barrier_wait(q_full.at[warpgroup])
                pl.when(warpgroup == 1)(take_turns)
                empty = (
                    plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA),
                    plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), plgpu.Layout.WGMMA.reduce(1)),
                    plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1)),
                )
                acc, m, total = lax.fori_loop(start, stop, attend, empty)
                pl.when(warpgroup == 0)(take_turns)
                if not in_place:
                    plgpu.barrier_arrive(q_empty.at[warpgroup])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                sees = total > 0
                total = jnp.where(sees, total, 1.0)
                out[...] = (acc * lax.broadcast_in_dim(1 / total, acc.shape, (0,))).astype(q.dtype)
                lse_out[...] = jnp.where(sees, (m + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, out_ref.at[batch, pl.ds(query, ROWS), head])
                plgpu.copy_smem_to_gmem(lse_out, lse_ref.at[batch, head, pl.ds(query, ROWS)])
                if in_place:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(q_empty.at[warpgroup])

            every_item(visit)
            plgpu.wait_smem_to_gmem(0)

    q_tiles = tiles.tile((WARPGROUPS, ROWS, H), q.dtype)
    k_tiles = tiles.tile((slots, block_kv, H), q.dtype)
    return hopper.kernel(
        body,
        out_type=[q, jax.ShapeDtypeStruct((B, N, visibility.padded(S)), jnp.float32)],
        grid=(min(hopper.cores(), query_tiles * B * N),),
        grid_names=("core",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            q_tiles,
            plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            None if in_place else q_tiles,
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            ring(slots, k_tiles, plgpu.SMEM((slots, 2, block_kv), jnp.int32)),
            ring(slots, k_tiles),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            tiles.staging((WARPGROUPS, ROWS, block_kv), q.dtype),
        ],
        kernel_name="flash_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, ranges, seen.window, seen.queries, seen.keys)

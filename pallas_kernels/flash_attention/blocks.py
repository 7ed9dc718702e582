"""What the kernels of `flash_attention` have in common.

Blocks stay and take one item after the other: a tile of queries, or of keys, that stays in shared memory while the
tiles that it meets pass through rings. Two warpgroups compute; a third one copies, and is ahead of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, launch

ROWS = 64  # of a warpgroup's tile
WARPGROUPS = 2  # that compute
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24


def persistent(name: str, body: Callable, items: int, out_type: Any, scratch: list[Any]) -> Callable[..., Any]:
    """A kernel of as many blocks as there are cores, or items."""
    return launch.kernel(
        body,
        out_type=out_type,
        grid=(min(hopper.cores(), items),),
        grid_names=("core",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def tuning_key(q, k, causal: bool, soft_cap: float | None) -> dict[str, Any]:
    """What the best Config depends on."""
    (B, S, N, H), (C, K) = q.shape, k.shape[1:3]
    sizes = {"b": B, "s": S, "n": N, "c": C, "k": K, "h": H}
    return sizes | {"dtype": q.dtype, "causal": causal, "capped": soft_cap is not None}


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


class Resident(NamedTuple):
    """Tiles of shared memory, one for each computing warpgroup, that stay for an item."""

    tiles: tuple[Any, ...]  # references, each [WARPGROUPS, ...]
    full: Any
    empty: Any


def resident(*tiles: Any) -> Resident:
    """Scratch of resident tiles."""
    return Resident(
        tiles,
        plgpu.Barrier(num_arrivals=len(tiles), num_barriers=WARPGROUPS),
        plgpu.Barrier(num_barriers=WARPGROUPS),
    )


def stream_keys(
    every_item, stay: Resident, sources: Callable, k_ring: Ring, v_ring: Ring, refs, block: int, group: int
):
    """The copying warpgroup of a kernel that keeps tiles of queries.

    Args:
      every_item: `items` but for its `visit`.
      stay: what stays of the queries.
      sources: `(batch, head, slice of queries)` -> a reference for each tile of `stay`.
      k_ring, v_ring: of keys with their segments, and of values.
      refs: keys, values, and segments with indices of the keys.
      block: keys of a tile.
      group: query heads that share a head of the keys.
    """
    k_ref, v_ref, keys_ref = refs
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

    def visit(item, step, tile, batch, head, ranges):
        for w in range(WARPGROUPS):
            pl.when(item > 0)(lambda w=w: plgpu.barrier_wait(stay.empty.at[w]))
            queries = pl.ds(tile * (WARPGROUPS * ROWS) + w * ROWS, ROWS)
            for source, target in zip(sources(batch, head, queries), stay.tiles, strict=True):
                plgpu.copy_gmem_to_smem(source, target.at[w], stay.full.at[w])

        @pl.loop(*ranges[:2])
        def _(i):
            at, keys, kv_head = step + i - ranges[0], pl.ds(i * block, block), lax.div(head, group)
            k_ring.fill(at, k_ref.at[batch, keys, kv_head], keys_ref.at[row_of(keys_ref, batch), :, keys])
            v_ring.fill(at, v_ref.at[batch, keys, kv_head])

    steps = every_item(visit)
    for w in range(WARPGROUPS):
        plgpu.barrier_wait(stay.empty.at[w])
    k_ring.drain(steps)
    v_ring.drain(steps)


def unless_all_seen(i, ranges, hide: Callable, z):
    """`hide(z)`, or `z` itself for the tiles whose queries see all of their keys."""
    return lax.cond((ranges[2] <= i) & (i < ranges[3]), lambda z: z, hide, z)

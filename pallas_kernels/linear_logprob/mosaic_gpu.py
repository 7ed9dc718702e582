"""Forward kernel of `linear_logprob`: logits tile by tile in registers, read by an online softmax, never written.

A block owns 128 rows and a range of the vocabulary; for each tile of it two warpgroups multiply 64 rows each, over the
whole width, with operands that a third one streams in (`over_logits`, which the backward kernel shares). Blocks of the
same range run at the same time, so that the head comes from L2. In units of log2, with m the running maximum and
d = z - m, a row keeps

    m,    s = sum of 2^d,    w = sum of d 2^d,    the logit of the target,

which XLA joins over the ranges:  lse = ln 2 (m + log2 s),  entropy = ln 2 (log2 s - w / s).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, launch, tiles
from pallas_kernels.numerics import LOG2E, LOWEST, over_rows, padded, tanh
from pallas_kernels.tuning import choice, config_for

DTYPES = (jnp.bfloat16, jnp.float16)
SWIZZLED = (8, 64)  # rows and columns; copies of tiles want arrays of whole ones
WARPGROUPS, WARPGROUP_ROWS = 2, 64
ROWS = WARPGROUPS * WARPGROUP_ROWS  # of a block
DEPTH = 64  # columns of hidden and head in one stage
TOGETHER = 16  # blocks of rows; with hopper.CORES / 16 ranges of tiles twice as long, the least distinct data in flight
PIECE = 128  # columns that go through the softmax together: registers do not hold a tile of everything


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    columns: int = choice(64, 128, 256)  # vocabulary entries of a tile
    stages: int = choice(2, 3, 4, 5, 6)  # of the pipeline
    group: int = choice(1, 2, 4, 8, 16, 32, 64)  # blocks of rows that pass over the vocabulary together
    splits: int = choice(1, 2, 4, 8, 16, 33, 66, 132)  # ranges of the vocabulary


def heuristic(m: int, v: int) -> Config:
    """Even groups of blocks of rows, each of which fills the cores once."""
    columns, blocks = 256, pl.cdiv(m, ROWS)
    group = pl.cdiv(blocks, pl.cdiv(blocks, TOGETHER))
    return Config(columns, 4, group, min(hopper.CORES // group, pl.cdiv(v, columns)))


def reasons(hidden, head, targets, temperature, chunk, soft_cap) -> list[str]:
    """Why the kernels cannot serve a call."""
    found = []
    if hidden.dtype not in DTYPES:
        found.append(f"dtype {hidden.dtype}; accepted: bfloat16, float16")
    if head.dtype != hidden.dtype:
        found.append(f"head {head.dtype} beside hidden {hidden.dtype}; accepted: the same dtype")
    if hidden.shape[1] % DEPTH:
        found.append(f"width {hidden.shape[1]}; accepted: multiples of {DEPTH}")
    return found


def over_logits(
    name: str,
    per_block: Callable[..., tuple[Any, Callable, Callable]],
    hidden: jax.Array,
    head: jax.Array,
    operands: tuple[jax.Array, ...],
    config: Config,
    out_type: Any,
    scratch: tuple = (),
) -> Any:
    """Runs a kernel that passes over the tiles of `hidden @ head.T`, float32 in registers.

    Args:
      name: the kernel's.
      per_block: called in each warpgroup with its rows, its range's index and the references; returns the initial
        carry, `consume(first column, logits, carry)` for each tile, and `finish(carry)`.
      hidden: `[M, D]`.
      head: `[V, D]`; logits beyond V are zero. Whole swizzled tiles, like `hidden`.
      operands: further arrays for `per_block`.
      config: how the work is cut.
      out_type: what the kernel writes.
      scratch: further shared memory for `per_block`.
    """
    (m, d), columns, stages = hidden.shape, config.columns, config.stages
    steps, ranges = pl.cdiv(d, DEPTH), config.splits

    def body(hidden_ref, head_ref, *refs):
        *own, hidden_smem, head_smem, full, empty = refs
        split, warpgroup = lax.axis_index("split"), lax.axis_index("warpgroup")
        row = (lax.axis_index("group") * config.group + lax.axis_index("block")) * ROWS
        tile_count = pl.cdiv(head.shape[0], columns)
        low, high = (lax.div(end * tile_count, ranges) for end in (split, split + 1))
        high = jnp.where(row < m, high, low)
        total = (high - low) * steps

        @pl.when(warpgroup == WARPGROUPS)
        def _memory():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, total)
            def _(step):
                slot = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                entry = (low + lax.div(step, steps)) * columns
                depth = pl.ds(lax.rem(step, steps) * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(hidden_ref.at[pl.ds(row, ROWS), depth], hidden_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(head_ref.at[pl.ds(entry, columns), depth], head_smem.at[slot], full.at[slot])

            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        @pl.when(warpgroup < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            here = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            carry, consume, finish = per_block(pl.ds(row + here.start, WARPGROUP_ROWS), *own)

            def multiply(tile, acc):
                first = (tile - low) * steps

                @pl.loop(first, first + steps)
                def _(step):
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, hidden_smem.at[slot, here], head_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)

                    @pl.when(step > first)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(step - 1, stages)])

                logits = acc[...]
                plgpu.barrier_arrive(empty.at[lax.rem(first + steps - 1, stages)])
                return logits

            def step(tile, carry):
                acc = plgpu.ACC((WARPGROUP_ROWS, columns), jnp.float32)
                logits = pl.run_scoped(lambda acc: multiply(tile, acc), acc)
                return consume(tile * columns, logits, carry)

            finish(lax.fori_loop(low, high, step, carry))

    groups = pl.cdiv(m, ROWS * config.group)
    return launch.kernel(
        body,
        out_type=out_type,
        grid=(groups, ranges, config.group),
        grid_names=("group", "split", "block"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            *scratch,
            tiles.tile((stages, ROWS, DEPTH), hidden.dtype),
            tiles.tile((stages, columns, DEPTH), head.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ],
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(hidden, head, *operands)


def load_rows(ref: Any, rows: Any) -> jax.Array:
    """One number a row, where the warpgroup holds the row."""
    return plgpu.load(ref.at[rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def columns_like(logits: jax.Array) -> jax.Array:
    """Index of each column."""
    return plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)


def linear_logprob_forward(hidden, head, targets, temperature, chunk, soft_cap):
    """`(logp [M], entropy [M], lse [M])` in float32."""
    del chunk  # no logits are held
    (m, d), v = hidden.shape, head.shape[0]
    config = config_for("linear_logprob_forward", heuristic(m, v), m=m, d=d, v=v, dtype=hidden.dtype)
    hidden, head = padded(hidden, SWIZZLED[0]), padded(head, SWIZZLED[0])
    targets = padded(targets.astype(jnp.int32), ROWS * config.group)

    def per_block(rows, targets_ref, scale_ref, out_ref):
        target, scale = load_rows(targets_ref, rows), scale_ref[0]

        def consume(first, z, carry):
            peak, total, weighted, hit = carry
            if soft_cap is not None:
                z = tanh(z * (1 / soft_cap))
            z *= scale
            if v % config.columns:
                z = jnp.where(columns_like(z) < v - first, z, LOWEST)
            new_peak = jnp.maximum(peak, z.max(axis=1))
            fall = peak - new_peak
            weighted = jnp.exp2(fall) * (weighted + fall * total)
            total = jnp.exp2(fall) * total
            for column in range(0, config.columns, PIECE):
                piece = z[:, column : column + PIECE]
                here = columns_like(piece) == over_rows(target - first - column, piece.shape)
                hit += jnp.where(here, piece, 0.0).sum(axis=1)
                below = piece - over_rows(new_peak, piece.shape)
                e = jnp.exp2(below)
                weighted += (e * below).sum(axis=1)
                total += e.sum(axis=1)
            return new_peak, total, weighted, hit

        def finish(carry):
            for i, value in enumerate(carry):
                out_ref[i, lax.axis_index("split"), rows] = value

        zero = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        return (zero + LOWEST, zero, zero, zero), consume, finish

    scale = (LOG2E if soft_cap is None else LOG2E * soft_cap) / temperature
    out_type = jax.ShapeDtypeStruct((4, config.splits, targets.shape[0]), jnp.float32)
    operands = (targets, scale.reshape(1))
    parts = over_logits("linear_logprob_forward", per_block, hidden, head, operands, config, out_type)
    peaks, totals, weighted, hit = parts[:, :, :m]
    peak = peaks.max(axis=0)
    fall = peaks - peak[None]
    weighted = (jnp.exp2(fall) * (weighted + fall * totals)).sum(axis=0)
    total = (jnp.exp2(fall) * totals).sum(axis=0)
    above = jnp.log2(total)
    return (hit.sum(axis=0) - peak - above) / LOG2E, (above - weighted / total) / LOG2E, (peak + above) / LOG2E

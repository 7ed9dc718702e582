"""Forward kernel of `quantized_matmul`: codes go from device memory through shared memory to wgmma's registers.

It computes out^T [N, M] = W [N, K] x^T [K, M], so that weights are wgmma's left operand, which may come from registers,
and M may be as small as 8. A memory warpgroup keeps several steps of codes, scales and x in flight; the others compute,
each 64 rows of W and one of several slices of every step's K, whose sums meet in shared memory. The scale of int8
belongs to a row of W and multiplies the result. Where blocks are too few for all cores, they split K too, and write
partial sums, which XLA adds.

A thread restores two 4-bit weights with one load from a table in shared memory that holds the two values of each byte,
once for each bank: shift, mask, load, product with the scale. With loads of codes and scales the machine code has 3.2
operations a weight, of them 1.0 for the integer units and 0.7 loads from shared memory. At 3.0 TB/s 6.0e12 weights
arrive a second: 1.9e13 of 3.3e13 operations, 6e12 of 1.6e13 integer ones, 4e12 of 8e12 loads.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, launch, tiles
from pallas_kernels.numerics import over_rows, padded
from pallas_kernels.quantized_matmul.formats import CODEBOOKS, DYNAMIC_MAP, GROUP, Quantized
from pallas_kernels.quantized_matmul.lookup import lookup, lookup_pairs
from pallas_kernels.tuning import choice, config_for

DTYPES = (jnp.bfloat16, jnp.float16)
ROWS = 64  # of W a warpgroup
EPILOGUE = 64  # rows of the result that leave together
LINE = 128  # bytes; copies want targets that start at a multiple
MOST = 4  # warpgroups that compute
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40  # of two that compute and one that copies


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut. There are at most four warpgroups that compute: `warpgroups * slices`."""

    tile_m: int = choice(8, 16, 32, 64, 128, 256)  # rows of x a block
    warpgroups: int = choice(1, 2, 4)  # 64 rows of W each
    slices: int = choice(1, 2, 4)  # of the inputs of a step
    groups: int = choice(1, 2, 4)  # of 64 inputs a slice
    stages: int = choice(2, 3, 4, 6, 8)  # steps in flight
    splits: int = choice(1, 2, 4, 8, 16)  # of K


def heuristic(m: int, n: int, k: int, format: str) -> Config:
    """Large tiles of x for compute; for few rows many warps, deep pipelines and splits of K for bandwidth."""
    tile_m = min(256, max(8, 1 << (m - 1).bit_length()))
    while tile_m > 64 and pl.cdiv(m, tile_m) * (n // 128) < hopper.CORES // 2:
        tile_m //= 2
    warpgroups = 2 if n % 128 == 0 else 1
    slices = 1 if tile_m > 64 else 4 // warpgroups
    rows, inputs = ROWS * warpgroups, GROUP * slices
    groups = 1 if tile_m > 32 else 2
    blocks, steps = pl.cdiv(m, tile_m) * (n // rows), k // (inputs * groups)

    def worthwhile(splits: int) -> bool:
        """Cores are free, pipelines still fill, and partial sums are small beside the codes."""
        return splits * blocks <= hopper.CORES and 2 * splits <= steps and 32 * splits * tile_m <= k

    splits = next(filter(worthwhile, (16, 8, 4, 2)), 1)
    code_bytes = GROUP if format == "int8" else GROUP // 2 + 1
    step_bytes = slices * (groups * (2 * GROUP * tile_m + rows * code_bytes) + 4 * rows)
    constant_bytes = 2048 + 4 * rows * min(EPILOGUE, tile_m) + (33 * 1024 if format != "int8" else 0)
    constant_bytes += 4 * rows * (slices - 1) * tile_m
    stages = next((s for s in (8, 6, 4, 3) if s * step_bytes + constant_bytes <= hopper.SHARED_MEMORY), 2)
    return Config(tile_m, warpgroups, slices, groups, stages, splits)


def reasons(x: jax.Array, w: Quantized) -> list[str]:
    """Why the kernel cannot serve a call."""
    found = []
    n, k = w.shape
    if x.dtype not in DTYPES:
        found.append(f"dtype {x.dtype}; accepted: bfloat16, float16")
    if n % ROWS:
        found.append(f"{n} outputs; accepted: multiples of {ROWS}")
    if k % GROUP:
        found.append(f"{k} inputs; accepted: multiples of {GROUP}")
    return found


def pairs(format: str, dtype) -> np.ndarray:
    """The two values of each byte of 4-bit codes, in `dtype`, as one uint32, once for each bank of shared memory."""
    values = CODEBOOKS[format].astype(dtype).view(np.uint16).astype(np.uint32)
    return np.repeat((values[:, None] << 16 | values[None, :]).reshape(-1, 1), 32, axis=1)


def quantized_matmul_forward(x: jax.Array, w: Quantized) -> jax.Array:
    """`x [M, K] @ dequantize(w).T`."""
    rows_of_x = x.shape[0]
    if rows_of_x > 8:  # copies move rows by eights, or all of them
        x = padded(x, 8)
    (m, k), n, dtype = x.shape, w.shape[0], x.dtype
    four_bits = w.format != "int8"
    config = config_for(
        "quantized_matmul_forward", heuristic(m, n, k, w.format), m=m, n=n, k=k, format=w.format, dtype=dtype
    )
    warpgroups, tile_m, stages = config.warpgroups, config.tile_m, config.stages
    rows, chunk = ROWS * warpgroups, min(EPILOGUE, config.tile_m)
    run = w.run if four_bits else config.groups
    groups = math.gcd(config.groups, run, k // GROUP)
    slices = math.gcd(config.slices, MOST // warpgroups, k // (GROUP * groups))
    inputs, together = GROUP * groups, groups * slices
    steps = k // (GROUP * together)
    splits = math.gcd(config.splits, steps)
    m_blocks, n_blocks, steps = pl.cdiv(m, tile_m), n // rows, steps // splits
    computing = warpgroups * slices
    out_dtype = dtype if splits == 1 else jnp.float32
    own_rows = plgpu.Layout.WGMMA.reduce(1)

    def body(x_ref, codes_ref, scale_ref, *others):
        constants: Any = others[:4] if four_bits else (None,) * 4
        block_scale_ref, offset_ref, pairs_ref, map_ref = constants
        out_ref, ring, sums, out_tile, stage, *tables = others[4 * four_bits :]
        x_tiles, code_tiles, scale_tiles, block_scale_tiles, full, empty = ring
        wg, split = lax.axis_index("wg"), lax.axis_index("split")
        block_m, block_n = plgpu.planar_snake(lax.axis_index("block"), (m_blocks, n_blocks), 0, 8)
        first_row, first_step = block_n * rows, split * steps

        @pl.when(wg == computing)
        def _memory():
            if computing == 2:
                plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            @pl.loop(0, steps)
            def _(i):
                slot = lax.rem(i, stages)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))

                def copy(source, target):
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot])

                at = (first_step + i) * slices
                if four_bits:
                    own = pl.ds(at * groups, together)
                    copy(codes_ref.at[own, pl.ds(block_n * (rows // 8), rows // 8)], code_tiles.at[slot])
                    copy(scale_ref.at[own, pl.ds(first_row, rows)], scale_tiles.at[slot, pl.ds(0, together)])
                for s in range(slices):
                    here = pl.ds((at + s) * inputs, inputs)
                    copy(x_ref.at[pl.ds(block_m * tile_m, tile_m), here], x_tiles.at[slot, s])
                    if four_bits:
                        source = block_scale_ref.at[lax.div((at + s) * groups, run), pl.ds(first_row, rows)]
                        copy(source, block_scale_tiles.at[slot, s])
                    else:
                        copy(codes_ref.at[pl.ds(first_row, rows), here], code_tiles.at[slot, s])

            @pl.loop(max(steps - stages, 0), steps)
            def _(i):
                plgpu.barrier_wait(empty.at[lax.rem(i, stages)])

        @pl.when(wg < computing)
        def _compute():
            if computing == 2:
                plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            part, own_slice = lax.div(wg, slices), lax.rem(wg, slices)
            own = pl.ds(part * ROWS, ROWS)
            if four_bits:  # scales relative to their mean, so that in float16 they neither overflow nor vanish
                table, map_tile, ready = tables

                @pl.when(wg == 0)
                def _():
                    plgpu.copy_gmem_to_smem(pairs_ref, table, ready)
                    plgpu.copy_gmem_to_smem(map_ref, map_tile, ready)

                mean = offset_ref[0]
                inverse = jnp.where(mean > 0, 1 / mean, 0.0)
                plgpu.barrier_wait(ready)

            def four_bit_weights(slot):
                block_scale = plgpu.load(block_scale_tiles.at[slot, own_slice, own], layout=own_rows, optimized=False)
                scales = []
                for g in range(groups):
                    code_ref = scale_tiles.at[slot, own_slice * groups + g, own]
                    code = plgpu.load(code_ref, layout=own_rows, optimized=False)
                    scales.append((lookup(map_tile, code) * (block_scale * inverse) + 1).astype(dtype))
                codes = code_tiles.at[slot, pl.ds(own_slice * groups, groups), pl.ds(part * 8, 8)]
                return lookup_pairs(codes, table, scales)

            def int8_weights(slot):
                codes = plgpu.load(code_tiles.at[slot, own_slice, own], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                return plgpu.layout_cast(codes.astype(dtype), plgpu.Layout.WGMMA)

            def step(i, acc):
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(full.at[slot])
                weights = four_bit_weights(slot) if four_bits else int8_weights(slot)
                own_stage = None if stage is None else stage.at[wg]
                acc = tiles.accumulate(acc, weights, x_tiles.at[slot, own_slice].transpose((1, 0)), own_stage)
                plgpu.barrier_arrive(empty.at[slot])
                return acc

            zeros = plgpu.layout_cast(jnp.zeros((ROWS, tile_m), jnp.float32), plgpu.Layout.WGMMA)
            acc = lax.fori_loop(0, steps, step, zeros)
            if slices > 1:
                others_sums, met = sums

                @pl.when(own_slice > 0)
                def _():
                    others_sums.at[part, own_slice - 1][...] = acc
                    plgpu.barrier_arrive(met)

            @pl.when(own_slice == 0)
            def _():
                total = acc
                if slices > 1:
                    plgpu.barrier_wait(met)
                    for s in range(slices - 1):
                        total += plgpu.load(others_sums.at[part, s], layout=plgpu.Layout.WGMMA)
                if four_bits:
                    total *= mean
                else:
                    scale = plgpu.load(
                        scale_ref.at[pl.ds(first_row + part * ROWS, ROWS)], layout=own_rows, optimized=False
                    )
                    total *= over_rows(scale, total.shape)
                for start in range(0, tile_m, chunk):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    piece = total[:, start : start + chunk].astype(out_dtype)
                    out_tile.at[part].transpose((1, 0))[...] = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.commit_smem()
                    columns = pl.ds(first_row + part * ROWS, ROWS)
                    plgpu.copy_smem_to_gmem(
                        out_tile.at[part], out_ref.at[split, pl.ds(block_m * tile_m + start, chunk), columns]
                    )
                plgpu.wait_smem_to_gmem(0)

    codes = w.codes.reshape(k // GROUP, n // 8, 256) if four_bits else w.codes
    operands, copies = [x, codes, w.scale], 2 * slices
    tables: list = []
    if four_bits:
        assert w.block_scale is not None and w.offset is not None
        operands += [w.block_scale, w.offset.reshape(1), jnp.asarray(pairs(w.format, dtype)), jnp.asarray(DYNAMIC_MAP)]
        copies += 2
        code_tiles = plgpu.SMEM((stages, together, rows // 8, 256), jnp.uint8)
        tables = [plgpu.SMEM((256, 32), jnp.uint32), plgpu.SMEM((256,), jnp.float32), plgpu.Barrier(num_arrivals=2)]
    else:
        code_tiles = tiles.tile((stages, slices, rows, inputs), jnp.int8)
    ring = (
        tiles.tile((stages, slices, tile_m, inputs), dtype),
        code_tiles,
        plgpu.SMEM((stages, max(together, LINE // rows), rows), jnp.uint8) if four_bits else None,
        plgpu.SMEM((stages, slices, rows), jnp.float32) if four_bits else None,
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
    )
    sums = None
    if slices > 1:
        others_sums = tiles.tile((warpgroups, slices - 1, ROWS, tile_m), jnp.float32)
        sums = others_sums, plgpu.Barrier(num_arrivals=computing - warpgroups)
    partial = launch.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((splits, m, n), out_dtype),
        grid=(m_blocks * n_blocks, splits),
        grid_names=("block", "split"),
        num_threads=computing + 1,
        thread_name="wg",
        scratch_types=[
            ring,
            sums,
            tiles.tile((warpgroups, chunk, ROWS), out_dtype),
            tiles.staging((computing, ROWS, inputs), dtype),
            *tables,
        ],
        kernel_name="quantized_matmul_forward",
    )(*operands)
    return (partial[0] if splits == 1 else partial.sum(axis=0).astype(dtype))[:rows_of_x]

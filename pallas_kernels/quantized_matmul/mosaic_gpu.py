"""Forward kernel of `quantized_matmul`: codes go from device memory through shared memory to wgmma's registers.

It computes out^T [N, M] = W [N, K] x^T [K, M], so that weights are wgmma's left operand, which may come from registers,
and M may be as small as 8. A memory warpgroup keeps several steps of codes, scales and x in flight; each compute
warpgroup owns 64 rows of W. The scale of int8 belongs to a row of W and multiplies the result. Where blocks are too few
for all cores, they split K and write partial sums, which XLA adds.

A thread restores two 4-bit weights with one load from a table in shared memory that holds the two values of each byte,
once for each bank: shift, mask, load, product with the scale. With loads of codes and scales the machine code has 3.2
operations a weight, of them 1.0 for the integer units and 0.7 loads from shared memory. At 3.0 TB/s 6.0e12 weights
arrive a second: 1.9e13 of 3.3e13 operations, 6e12 of 1.6e13 integer ones, 4e12 of 8e12 loads.
"""

import dataclasses
import math

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


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    tile_m: int = choice(8, 16, 32, 64, 128, 256)  # rows of x a block
    warpgroups: int = choice(1, 2, 4)  # that compute, 64 rows of W each
    groups: int = choice(1, 2, 4)  # of 64 inputs a step
    stages: int = choice(2, 3, 4, 6, 8)  # steps in flight
    splits: int = choice(1, 2, 4, 8, 16)  # of K


def heuristic(m: int, n: int, k: int, format: str) -> Config:
    """Large tiles of x for compute; for few rows many warps, deep pipelines and splits of K for bandwidth."""
    tile_m = min(256, max(8, 1 << (m - 1).bit_length()))
    while tile_m > 64 and pl.cdiv(m, tile_m) * (n // 128) < hopper.CORES // 2:
        tile_m //= 2
    warpgroups = 4 if tile_m <= 64 and n % 256 == 0 else 2 if n % 128 == 0 else 1
    rows = ROWS * warpgroups
    groups = 1 if tile_m > 32 else 2 if format == "int8" else 4
    blocks, steps = pl.cdiv(m, tile_m) * (n // rows), k // (GROUP * groups)

    def worthwhile(splits: int) -> bool:
        """Cores are free, pipelines still fill, and partial sums are small beside the codes."""
        return splits * blocks <= hopper.CORES and 2 * splits <= steps and 32 * splits * tile_m <= k

    splits = next(filter(worthwhile, (16, 8, 4, 2)), 1)
    code_bytes = GROUP if format == "int8" else GROUP // 2 + 1
    step_bytes = groups * (2 * GROUP * tile_m + rows * code_bytes) + 4 * rows
    constant_bytes = 2048 + 4 * rows * min(EPILOGUE, tile_m) + (33 * 1024 if format != "int8" else 0)
    stages = next((s for s in (8, 6, 4, 3) if s * step_bytes + constant_bytes <= hopper.SHARED_MEMORY), 2)
    return Config(tile_m, warpgroups, groups, stages, splits)


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
    warpgroups, tile_m = config.warpgroups, config.tile_m
    rows, chunk = ROWS * warpgroups, min(EPILOGUE, config.tile_m)
    run = w.run if four_bits else config.groups
    groups = math.gcd(config.groups, run, k // GROUP)
    steps = k // (GROUP * groups)
    splits = math.gcd(config.splits, steps)
    m_blocks, n_blocks, steps = pl.cdiv(m, tile_m), n // rows, steps // splits
    out_dtype = dtype if splits == 1 else jnp.float32
    own_rows = plgpu.Layout.WGMMA.reduce(1)

    def body(x_ref, codes_ref, scale_ref, *others):
        if four_bits:
            block_scale_ref, offset_ref, pairs_ref, map_ref = others[:4]
        out_ref, out_tile, stages, table, map_tile, ready = others[-6:]
        wg, split = lax.axis_index("wg"), lax.axis_index("split")
        block_m, block_n = plgpu.planar_snake(lax.axis_index("block"), (m_blocks, n_blocks), 0, 8)
        first_row, first_step = block_n * rows, split * steps
        stage = None if stages is None else stages.at[wg]
        if four_bits:  # scales relative to their mean, so that in float16 they neither overflow nor vanish
            mean = offset_ref[0]
            inverse = jnp.where(mean > 0, 1 / mean, 0.0)

        def compute(pipeline):
            if four_bits:

                @pl.when(wg == 0)
                def _():
                    plgpu.copy_gmem_to_smem(pairs_ref, table, ready)
                    plgpu.copy_gmem_to_smem(map_ref, map_tile, ready)

                plgpu.barrier_wait(ready)
            acc = pipeline(jnp.zeros((ROWS, tile_m), jnp.float32))
            if four_bits:
                acc *= mean
            else:
                own = scale_ref.at[pl.ds(first_row + wg * ROWS, ROWS)]
                scale = plgpu.load(own, layout=own_rows, optimized=False)
                acc *= over_rows(scale, acc.shape)
            for start in range(0, tile_m, chunk):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                part = acc[:, start : start + chunk].astype(out_dtype)
                out_tile.at[wg].transpose((1, 0))[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    out_tile.at[wg],
                    out_ref.at[split, pl.ds(block_m * tile_m + start, chunk), pl.ds(first_row + wg * ROWS, ROWS)],
                )
            plgpu.wait_smem_to_gmem(0)

        def step(_, x_tile, codes_tile, *scale_tiles_and_acc):
            *scale_tiles, acc = scale_tiles_and_acc
            if four_bits:
                scale_tile, block_scale_tile = scale_tiles
                own = pl.ds(wg * ROWS, ROWS)
                block_scale = plgpu.load(block_scale_tile.at[0, own], layout=own_rows, optimized=False) * inverse
                scales = []
                for g in range(groups):
                    code = plgpu.load(scale_tile.at[g, own], layout=own_rows, optimized=False)
                    scales.append((lookup(map_tile, code) * block_scale + 1).astype(dtype))
                weights = lookup_pairs(codes_tile.at[:, pl.ds(wg * 8, 8)], table, scales)
            else:
                codes = plgpu.load(codes_tile.at[pl.ds(wg * ROWS, ROWS)], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                weights = plgpu.layout_cast(codes.astype(dtype), plgpu.Layout.WGMMA)
            return tiles.accumulate(acc, weights, x_tile.transpose((1, 0)), stage)

        specs = [tiles.block((tile_m, GROUP * groups), dtype, lambda i: (block_m, first_step + i))]
        operands = [x_ref, codes_ref]
        if four_bits:
            specs += [
                plgpu.BlockSpec((groups, rows // 8, 256), lambda i: (first_step + i, block_n, 0)),
                plgpu.BlockSpec((groups, rows), lambda i: (first_step + i, block_n)),
                plgpu.BlockSpec((1, rows), lambda i: ((first_step + i) * groups // run, block_n)),
            ]
            operands += [scale_ref, block_scale_ref]
        else:
            specs.append(tiles.block((rows, GROUP * groups), jnp.int8, lambda i: (block_n, first_step + i)))
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            in_specs=specs,
            max_concurrent_steps=config.stages,
            num_compute_wgs=warpgroups,
            memory_registers=40,
            wg_axis="wg",
            compute_context=compute,
        )(*operands)

    codes = w.codes.reshape(k // GROUP, n // 8, 256) if four_bits else w.codes
    operands = [x, codes, w.scale]
    if four_bits:
        assert w.block_scale is not None and w.offset is not None
        operands += [w.block_scale, w.offset.reshape(1), jnp.asarray(pairs(w.format, dtype)), jnp.asarray(DYNAMIC_MAP)]
    stage = tiles.staging((warpgroups, ROWS, GROUP * groups), dtype)
    partial = launch.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((splits, m, n), out_dtype),
        grid=(m_blocks * n_blocks, splits),
        grid_names=("block", "split"),
        num_threads=warpgroups + 1,
        thread_name="wg",
        scratch_types=[
            tiles.tile((warpgroups, chunk, ROWS), out_dtype),
            stage,
            plgpu.SMEM((256, 32), jnp.uint32) if four_bits else None,
            plgpu.SMEM((256,), jnp.float32) if four_bits else None,
            plgpu.Barrier(num_arrivals=2) if four_bits else None,
        ],
        kernel_name="quantized_matmul_forward",
    )(*operands)
    return (partial[0] if splits == 1 else partial.sum(axis=0).astype(dtype))[:rows_of_x]

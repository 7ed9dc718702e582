"""Kernels of `decode_attention`: flash-decoding, with the keys where wgmma wants its 64 rows.

A block takes one row, one key/value head and one of several equal shares of the row's tiles of T slots. With its G
query heads as columns (padded to a multiple of 8) it keeps, from tile to tile, the online softmax

    s = K q^T * scale  [T, G]      top' = max(top, max_T s)      p = exp(s - top')
    total' = total exp(top - top') + sum_T p                     acc' = acc exp(top - top') + V^T p  [H, G]

Both products take the large tile as left operand, so that tensor cores and softmax spend nothing on padding a few heads
to 64 rows, and a block is small enough for several to share a core and hide each other's latency. A second kernel joins
the shares: out = sum acc exp(top - max top) / sum total exp(top - max top).

An int8 cache is widened on the way: keys in registers, which wgmma takes as left operand; values into a tile of shared
memory, while the first product runs. The scales, one a slot, multiply rows of s and p.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import hopper, launch, tiles
from pallas_kernels.numerics import LOG2E, LOWEST, over_columns, over_rows
from pallas_kernels.tuning import choice, config_for

DTYPES = (jnp.bfloat16, jnp.float16)
WIDTHS = (64, 128, 256)
WIDEST_GROUP = 64  # query heads of a block
STAGES = 2  # enough where several blocks share a core
OVERHEAD = 3  # tiles


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    keys: int = choice(64, 128, 256)  # of a tile
    stages: int = choice(2, 3, 4, 6)  # tiles of keys and of values in flight
    splits: int = choice(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # shares of a row and key/value head


def heuristic(b: int, c: int, k: int, h: int, dtype: DTypeLike) -> Config:
    """Tiles of 32 KiB or less, several blocks a core, and the shares that finish first.

    A wave of blocks takes as long as its tiles and `OVERHEAD` more.
    """
    itemsize = jnp.dtype(dtype).itemsize
    keys = 64 if itemsize == 1 else max(64, min(128, 8192 // h))
    widened = keys * (2 * h + 128) if itemsize == 1 else 0
    block = STAGES * 2 * keys * h * itemsize + widened + 10 * 1024
    resident, count = hopper.CORES * (hopper.SHARED_MEMORY // block), pl.cdiv(c, keys)
    splits = min(range(1, min(count, 64) + 1), key=lambda s: pl.cdiv(b * k * s, resident) * (count / s + OVERHEAD))
    return Config(keys=keys, stages=STAGES, splits=splits)


def reasons(q, keys, values, starts, ends, key_scales, value_scales, scale, soft_cap) -> list[str]:
    """Why the kernel cannot serve a call."""
    found = []
    if q.dtype not in DTYPES:
        found.append(f"dtype {q.dtype}; accepted: bfloat16, float16")
    if q.shape[2] not in WIDTHS:
        found.append(f"head width {q.shape[2]}; accepted: 64, 128, 256")
    if keys.shape[2] % 8:
        found.append(f"{keys.shape[2]} cache slots; accepted: multiples of 8")
    return found


def decode_attention_forward(q, keys, values, starts, ends, key_scales, value_scales, scale, soft_cap):
    """`[B, N, H]` in the dtype of `q`."""
    B, N, H = q.shape
    _, K, C, _ = keys.shape
    config = config_for(
        "decode_attention_forward", heuristic(B, C, K, H, keys.dtype), b=B, c=C, k=K, h=H, dtype=keys.dtype
    )
    T, S, heads = config.keys, config.splits, N // K
    columns = heads if heads < 8 else 8 * pl.cdiv(heads, 8)  # TMA wants whole tiles of 8, or a part of one
    G = min(8 * pl.cdiv(columns, 8), WIDEST_GROUP)
    groups = pl.cdiv(columns, G)
    grouped = jnp.pad(q.reshape(B, K, heads, H), ((0, 0), (0, 0), (0, columns - heads), (0, 0)))
    quantised = key_scales is not None
    scales = [key_scales, value_scales] if quantised else []

    def body(q_ref, k_ref, v_ref, starts_ref, ends_ref, *refs):
        scale_refs, refs = refs[: len(scales)], refs[len(scales) :]
        acc_ref, stats_ref, q_smem, p_smem, acc_smem, stats_smem, wide_smem, stage, barrier = refs
        row, group, split, head = (lax.axis_index(axis) for axis in ("row", "group", "split", "head"))
        plgpu.copy_gmem_to_smem(q_ref.at[row, head, pl.ds(group * G, G)], q_smem, barrier)
        plgpu.barrier_wait(barrier)
        start, end = jnp.maximum(starts_ref[row], 0), jnp.minimum(ends_ref[row], C)
        first = start // T
        count = jnp.where(start < end, pl.cdiv(end, T) - first, 0)
        low, high = first + count * split // S, first + count * (split + 1) // S

        def left_operand(codes):
            wide = plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_2X).astype(q.dtype)
            return tiles.left_operand(plgpu.layout_cast(wide, plgpu.Layout.WGMMA), stage)

        def widen(codes):
            wide_smem[...] = plgpu.load(codes, layout=plgpu.Layout.WGMMA_8BIT).astype(q.dtype)
            plgpu.commit_smem()

        def by_row(scale_tile, shape):
            return over_rows(plgpu.load(scale_tile, layout=plgpu.Layout.WGMMA.reduce(1)), shape)

        def step(index, k_tile, v_tile, *rest):
            *scale_tiles, (acc, top, total) = rest
            k_operand = left_operand(k_tile) if quantised else k_tile

            def scores(ref):
                plgpu.wgmma(ref, k_operand, q_smem.T)
                if quantised:
                    widen(v_tile)
                return ref[...]

            s = pl.run_scoped(scores, plgpu.ACC((T, G), jnp.float32))
            k_factor, v_factor = (by_row(tile, s.shape) for tile in scale_tiles) if quantised else (1, 1)
            s *= k_factor * (scale * LOG2E)
            if soft_cap is not None:
                s = jnp.tanh(s * (1 / (soft_cap * LOG2E))) * (soft_cap * LOG2E)
            slot = (low + index[0]) * T + plgpu.broadcasted_iota(jnp.int32, s.shape, 0)
            s = jnp.where((slot >= start) & (slot < end), s, LOWEST)
            new_top = jnp.maximum(top, s.max(axis=0))
            decay = jnp.exp2(top - new_top)
            p = jnp.exp2(s - over_columns(new_top, s.shape))
            p_smem.T[...] = (p * v_factor).astype(q.dtype)
            plgpu.commit_smem()
            mixed = tiles.product((wide_smem if quantised else v_tile).T, p_smem.T)
            return acc * over_columns(decay, acc.shape) + mixed, new_top, total * over_columns(decay, p.shape) + p

        of_cache = tiles.block((T, H), keys.dtype, lambda i: (low + i, 0))
        of_scales = plgpu.BlockSpec((T,), lambda i: (low + i,))
        zero = jnp.zeros((H, G), jnp.float32), jnp.full((G,), LOWEST, jnp.float32), jnp.zeros((T, G), jnp.float32)
        acc, top, total = plgpu.emit_pipeline(
            step,
            grid=(high - low,),
            in_specs=[of_cache, of_cache] + [of_scales] * len(scales),
            max_concurrent_steps=config.stages,
            init_carry=zero,
        )(*(ref.at[row, head] for ref in (k_ref, v_ref, *scale_refs)))
        acc_smem[...] = acc
        stats_smem[0] = top
        stats_smem[1] = total.sum(axis=0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(acc_smem, acc_ref.at[row, head, group, split])
        plgpu.copy_smem_to_gmem(stats_smem, stats_ref.at[row, head, group, split])
        plgpu.wait_smem_to_gmem(0)

    shares = (B, K, groups, S)
    acc, stats = launch.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((*shares, H, G), jnp.float32),
            jax.ShapeDtypeStruct((*shares, 2, G), jnp.float32),
        ],
        grid=(B, groups, S, K),
        grid_names=("row", "group", "split", "head"),
        scratch_types=[
            tiles.tile((G, H), q.dtype),
            tiles.tile((G, T), q.dtype),
            tiles.tile((H, G), jnp.float32),
            plgpu.SMEM((2, G), jnp.float32),
            tiles.tile((T, H), q.dtype) if quantised else None,
            tiles.staging((T, H), q.dtype) if quantised else None,
            plgpu.Barrier(),
        ],
        kernel_name="decode_attention_forward",
    )(grouped, keys, values, starts, ends, *scales)
    return _join(acc, stats, columns, q.dtype)[:, :, :heads].reshape(B, N, H)


def _join(acc, stats, columns, dtype):
    """`[B, K, columns, H]` from shares `acc [B, K, groups, S, H, G]` and tops and totals `stats [..., S, 2, G]`."""
    B, K, groups, S, H, G = acc.shape

    def body(acc_ref, stats_ref, out_ref, stats_smem, out_smem, barrier):
        row, group, head = (lax.axis_index(axis) for axis in ("row", "group", "head"))
        plgpu.copy_gmem_to_smem(stats_ref.at[row, head, group], stats_smem, barrier)
        plgpu.barrier_wait(barrier)

        def step(index, acc_tile, carry):
            acc, top, total = carry
            (split,) = index
            new_top = jnp.maximum(top, stats_smem[split, 0])
            decay, weight = jnp.exp2(top - new_top), jnp.exp2(stats_smem[split, 0] - new_top)
            acc = acc * over_columns(decay, acc.shape) + acc_tile[...] * over_columns(weight, acc.shape)
            return acc, new_top, total * decay + stats_smem[split, 1] * weight

        acc, _, total = plgpu.emit_pipeline(
            step,
            grid=(S,),
            in_specs=[plgpu.BlockSpec((None, H, G), lambda s: (s, 0, 0), transforms=tiles.layout(G, jnp.float32))],
            max_concurrent_steps=4,
            init_carry=(
                jnp.zeros((H, G), jnp.float32),
                jnp.full((G,), LOWEST, jnp.float32),
                jnp.zeros((G,), jnp.float32),
            ),
        )(acc_ref.at[row, head, group])
        inverse = 1 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        out_smem.T[...] = (acc * over_columns(inverse, acc.shape)).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, head, pl.ds(group * G, G)])
        plgpu.wait_smem_to_gmem(0)

    return launch.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B, K, columns, H), dtype),
        grid=(B, groups, K),
        grid_names=("row", "group", "head"),
        scratch_types=[plgpu.SMEM((S, 2, G), jnp.float32), tiles.tile((G, H), dtype), plgpu.Barrier()],
        kernel_name="decode_attention_combine",
    )(acc, stats)

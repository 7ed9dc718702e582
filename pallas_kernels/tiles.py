"""Tiles in shared memory and products of tiles, as every kernel with a matrix product needs them.

wgmma takes its left operand from registers or from shared memory. The simulator knows only the second, and no
accumulator that starts with values: there, `accumulate` goes through a tile of shared memory and adds.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.hopper import is_simulated


def layout(width: int, dtype: DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Tiling and swizzle of a tile whose rows have `width` elements, as wgmma and TMA want them."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(width * bits)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def tile(shape: tuple[int, ...], dtype: DTypeLike) -> plgpu.SMEM:
    """A tile in shared memory that wgmma can read, or several with leading axes."""
    return plgpu.SMEM(shape, dtype, transforms=layout(shape[-1], dtype))


def block(shape: tuple[int, ...], dtype: DTypeLike, index_map) -> plgpu.BlockSpec:
    """The same as an operand of a pipeline."""
    return plgpu.BlockSpec(shape, index_map, transforms=layout(shape[-1], dtype))


def staging(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """What `accumulate` needs beside its operands: nothing on the GPU, a tile in the simulator."""
    return tile(shape, dtype) if is_simulated() else None


def product(lhs, rhs) -> jax.Array:
    """`lhs @ rhs` of two tiles in shared memory, float32 in registers."""

    def compute(acc):
        plgpu.wgmma(acc, lhs, rhs)
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC((lhs.shape[0], rhs.shape[1]), jnp.float32))


def two_products(
    first: tuple[Any, Any], second: tuple[Any, Any], meanwhile: Callable, *, overlap: bool | int
) -> tuple[Any, jax.Array]:
    """`(meanwhile(a @ b), c @ d)` of tiles in shared memory; with `overlap`, c @ d runs while `meanwhile` computes."""
    if is_simulated() or not overlap:
        return meanwhile(product(*first)), product(*second)

    def compute(first_acc, second_acc):
        plgpu.wgmma(first_acc, *first)
        plgpu.wgmma(second_acc, *second)
        return meanwhile(plgpu.wgmma_accumulator_load(first_acc, wait_n=1)), second_acc[...]

    accs = (plgpu.ACC((lhs.shape[0], rhs.shape[1]), jnp.float32) for lhs, rhs in (first, second))
    return pl.run_scoped(compute, *accs)


def left_operand(x: jax.Array, stage) -> Any:
    """`x` in registers as `wgmma` takes it: itself on the GPU, in the simulator through `stage` from `staging`."""
    if not is_simulated():
        return x
    stage[...] = x
    plgpu.commit_smem()
    return stage


def accumulate(acc: jax.Array, lhs: jax.Array, rhs, stage) -> jax.Array:
    """`acc + lhs @ rhs`; `acc` and `lhs` in registers, `rhs` in shared memory, `stage` from `staging`."""
    if not is_simulated():
        return pl.run_state(lambda ref: plgpu.wgmma(ref, lhs, rhs))(plgpu.ACC.init(acc))
    stage[...] = lhs
    plgpu.commit_smem()
    return acc + product(stage, rhs)


def accumulate_two(
    accs: tuple[jax.Array, jax.Array], first: tuple[Any, Any], second: tuple[Callable, Any], stage
) -> Any:
    """`accumulate` twice; the left operand of the second is computed by a function while the first product runs."""
    if is_simulated():
        return accumulate(accs[0], *first, stage), accumulate(accs[1], second[0](), second[1], stage)

    def compute(refs):
        plgpu.wgmma(refs[0], *first)
        plgpu.wgmma(refs[1], second[0](), second[1])

    return pl.run_state(compute)(tuple(map(plgpu.ACC.init, accs)))

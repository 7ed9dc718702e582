"""Kernel of `adamw_8bit`: a warp holds a block's 256 elements in registers, so that a scale is a reduction of one warp.

Parameter and moments are read once and written in place; the arithmetic is that of `reference.update_blocks`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.adamw_8bit.reference import BLOCK, Moments, Numbers, update_blocks
from pallas_kernels.tuning import choice, config_for

DTYPES = (jnp.bfloat16, jnp.float32)
WARPS = 4  # of a warpgroup
# A row a warp, four consecutive elements a lane: 16 bytes of float32, 128 bytes of codes a warp.
LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    rows: int = choice(4, 8, 16)  # blocks of 256 elements that a warpgroup holds at once


def heuristic() -> Config:
    """A block a warp: few registers, so that many warpgroups wait for memory at once."""
    return Config(rows=WARPS)


def reasons(param, grad, moments, numbers, seed, stochastic) -> list[str]:
    """Why the kernel cannot serve a call."""
    found = [
        f"{name} {x.dtype}; accepted: bfloat16, float32"
        for name, x in (("param", param), ("grad", grad))
        if x.dtype not in DTYPES
    ]
    if param.size == 0 or param.size % (WARPS * BLOCK):
        found.append(f"{param.size} elements; accepted: multiples of {WARPS * BLOCK}")
    if any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves((param, grad, moments))):
        found.append("shard_map with check_vma=True has no references to write to; accepted: check_vma=False")
    return found


def adamw_8bit_step(param, grad, moments, numbers, seed, stochastic):
    """`(param, moments)`, in the memory of the arguments where XLA may give it up."""
    n_rows = param.size // BLOCK
    key = {"rows": n_rows, "param": param.dtype, "grad": grad.dtype}
    rows = math.gcd(n_rows, config_for("adamw_8bit_step", heuristic(), **key).rows)

    def body(param_ref, m_codes_ref, m_scales_ref, v_codes_ref, v_scales_ref, grad_ref, numbers_ref, seed_ref, *stages):
        first_row = lax.axis_index("block") * rows
        here = pl.ds(first_row, rows)

        def load(ref):
            return plgpu.load(ref.at[here], layout=LAYOUT, optimized=False)

        def load_scales(ref):
            return plgpu.load(ref.at[here], layout=LAYOUT.reduce(1), optimized=False)

        old = Moments(load(m_codes_ref), load_scales(m_scales_ref), load(v_codes_ref), load_scales(v_scales_ref))
        scalars = Numbers(*(numbers_ref[i] for i in range(len(Numbers._fields))))
        new, updated = update_blocks(load(param_ref), load(grad_ref), old, scalars, seed_ref[0], first_row, stochastic)
        param_ref[here], m_codes_ref[here], v_codes_ref[here] = new, updated.m_codes, updated.v_codes
        # Every lane of a warp holds its rows' scales: through shared memory they leave in one piece.
        stages[0][...], stages[1][...] = updated.m_scales, updated.v_scales
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stages[0], m_scales_ref.at[here])
        plgpu.copy_smem_to_gmem(stages[1], v_scales_ref.at[here])
        plgpu.wait_smem_to_gmem(0)

    def blocks(x):
        return x.reshape(n_rows, BLOCK)

    changed = (param, *moments)
    in_place = [
        jax.new_ref(x)
        for x in (blocks(param), blocks(moments.m_codes), moments.m_scales, blocks(moments.v_codes), moments.v_scales)
    ]
    plgpu.kernel(
        body,
        scratch_types=[plgpu.SMEM((rows,), jnp.float32)] * 2,
        grid=(n_rows // rows,),
        grid_names=("block",),
        kernel_name="adamw_8bit_step",
    )(*in_place, blocks(grad), jnp.stack(numbers), seed[None])
    new, *updated = (ref[...].reshape(x.shape) for ref, x in zip(in_place, changed, strict=True))
    return new, Moments(*updated)

"""Kernel of `adamw_8bit`: a warp holds a block's 256 elements in registers, so that a scale is a reduction of one warp.

Parameter and moments are read once and written in place; the arithmetic is that of `reference.update_blocks`. Inside a
`shard_map` that checks what varies, where jax has no references, they are written to new arrays instead.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import launch
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
    return found


def adamw_8bit_step(param, grad, moments, numbers, seed, stochastic):
    """`(param, moments)`, in the memory of the arguments where XLA may give it up."""
    n_rows = param.size // BLOCK
    key = {"rows": n_rows, "param": param.dtype, "grad": grad.dtype}
    rows = math.gcd(n_rows, config_for("adamw_8bit_step", heuristic(), **key).rows)
    in_place = not launch.varying_axes(param, grad, moments, numbers, seed)

    def body(*refs):
        old_refs, (grad_ref, numbers_ref, seed_ref), new_refs = refs[:5], refs[5:8], refs[8:]
        first_row = lax.axis_index("block") * rows
        here = pl.ds(first_row, rows)

        def load(ref):
            layout = LAYOUT if len(ref.shape) == 2 else LAYOUT.reduce(1)
            return plgpu.load(ref.at[here], layout=layout, optimized=False)

        param, *moments = (load(ref) for ref in old_refs)
        scalars = Numbers(*(numbers_ref[i] for i in range(len(Numbers._fields))))
        param, moments = update_blocks(
            param, load(grad_ref), Moments(*moments), scalars, seed_ref[0], first_row, stochastic
        )
        for ref, x in zip(new_refs or old_refs, (param, *moments), strict=True):
            _store(ref.at[here], x)

    def blocks(x):
        return x.reshape(n_rows, BLOCK)

    old = [blocks(param), blocks(moments.m_codes), moments.m_scales, blocks(moments.v_codes), moments.v_scales]
    old = [jax.new_ref(x) for x in old] if in_place else old
    new = launch.kernel(
        body,
        out_type=[] if in_place else [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old],
        grid=(n_rows // rows,),
        grid_names=("block",),
        kernel_name="adamw_8bit_step",
    )(*old, blocks(grad), jnp.stack(numbers), seed[None])
    new = [ref[...] for ref in old] if in_place else new
    new_param, *updated = (x.reshape(like.shape) for x, like in zip(new, (param, *moments), strict=True))
    return new_param, Moments(*updated)


def _store(ref, x):
    """One lane of a warp writes a scale, which jax 0.12 wants to be told that it is meant; 0.11 has no such check."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x

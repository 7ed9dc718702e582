"""Backward kernel of `rms_norm`: gradients of input and scale from one pass over the rows.

With u = h rstd and g = dy * weight:  dh = rstd (g - u mean(g u)),  dscale = sum over rows of dy u.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, launch
from pallas_kernels.rms_norm.mosaic_gpu import LANES, row_layout
from pallas_kernels.tuning import choice, config_for

CHUNK = 2048  # columns in registers at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    blocks: int = choice(132, 264, 528, 1056)  # each sums the scale's gradient over its rows


def heuristic(m: int, d: int) -> Config:
    """A few blocks a core; a wide row leaves registers for fewer."""
    return Config(blocks=hopper.cores() * (2 if d > 4096 else 4))


def rms_norm_backward(h, scale, rstd, dy, dh, offset):
    """`(gradient of h [M, D], gradient of scale [D] in float32)`; `dh`, from the residual stream, may be None."""
    m, d = h.shape
    blocks = min(m, config_for("rms_norm_backward", heuristic(m, d), m=m, d=d, dtype=h.dtype).blocks)
    width = next(w for w in range(min(d, CHUNK), 0, -LANES) if d % w == 0)
    chunks = [pl.ds(start, width) for start in range(0, d, width)]
    layout = row_layout(width, h.dtype)
    added = dh is not None

    def body(h_ref, scale_ref, rstd_ref, dy_ref, *refs):
        dh_ref, (dx_ref, dscale_ref) = (refs[0], refs[1:]) if added else (None, refs)
        block = lax.axis_index("block")

        def load(ref, *index):
            return plgpu.load(ref.at[index], layout=layout).astype(jnp.float32)

        def step(i, dscale):
            row = block + i * blocks
            rstd = rstd_ref[row]

            def terms(columns):
                """Once for the mean and once more, from L1: registers do not hold a row of everything."""
                unit, dy_row = load(h_ref, row, columns) * rstd, load(dy_ref, row, columns)
                return unit, dy_row, dy_row * (load(scale_ref, columns) + offset)

            mean = jnp.float32(0)
            for columns in chunks:
                unit, _, g = terms(columns)
                mean += jnp.sum(g * unit) * (1 / d)
            sums = []
            for columns, sum_so_far in zip(chunks, dscale, strict=True):
                unit, dy_row, g = terms(columns)
                dx = rstd * (g - unit * mean)
                if dh_ref is not None:
                    dx += load(dh_ref, row, columns)
                dx_ref[row, columns] = dx.astype(h.dtype)
                sums.append(sum_so_far + dy_row * unit)
            return tuple(sums)

        zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        for columns, dscale in zip(
            chunks, lax.fori_loop(0, pl.cdiv(m - block, blocks), step, (zero,) * len(chunks)), strict=True
        ):
            dscale_ref[block, columns] = dscale

    dx, partial = launch.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((m, d), h.dtype), jax.ShapeDtypeStruct((blocks, d), jnp.float32)],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="rms_norm_backward",
    )(h, scale, rstd, dy, *[dh] * added)
    return dx, partial.sum(axis=0)

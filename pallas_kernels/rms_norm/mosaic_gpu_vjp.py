"""Backward kernel of `rms_norm`: gradients of input and scale from one pass over the rows.

With u = h rstd and g = dy * weight:  dh = rstd (g - u mean(g u)),  dscale = sum over rows of dy u.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import CORES
from pallas_kernels.rms_norm.mosaic_gpu import row_layout
from pallas_kernels.tuning import choice, config_for


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    blocks: int = choice(132, 264, 528, 1056)  # each sums the scale's gradient over its rows


def heuristic(m: int, d: int) -> Config:
    """A few blocks a core; a wide row leaves registers for fewer."""
    return Config(blocks=CORES * (2 if d > 4096 else 4))


def rms_norm_backward(h, scale, rstd, dy, dh, offset):
    """`(gradient of h [M, D], gradient of scale [D] in float32)`; `dh`, from the residual stream, may be None."""
    m, d = h.shape
    blocks = min(m, config_for("rms_norm_backward", heuristic(m, d), m=m, d=d, dtype=h.dtype).blocks)
    layout = row_layout(d, h.dtype)
    added = dh is not None

    def body(h_ref, scale_ref, rstd_ref, dy_ref, *refs):
        dh_ref, (dx_ref, dscale_ref) = (refs[0], refs[1:]) if added else (None, refs)
        block = lax.axis_index("block")
        weight = plgpu.load(scale_ref, layout=layout).astype(jnp.float32) + offset

        def step(i, dscale):
            row = block + i * blocks
            scale_of_row = rstd_ref[row]
            unit = plgpu.load(h_ref.at[row], layout=layout).astype(jnp.float32) * scale_of_row
            dy_row = plgpu.load(dy_ref.at[row], layout=layout).astype(jnp.float32)
            g = dy_row * weight
            dx = scale_of_row * (g - unit * (jnp.sum(g * unit) * (1 / d)))
            if dh_ref is not None:
                dx += plgpu.load(dh_ref.at[row], layout=layout).astype(jnp.float32)
            dx_ref[row] = dx.astype(h.dtype)
            return dscale + dy_row * unit

        zero = plgpu.layout_cast(jnp.zeros((d,), jnp.float32), layout)
        dscale_ref[block] = lax.fori_loop(0, pl.cdiv(m - block, blocks), step, zero)

    dx, partial = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((m, d), h.dtype), jax.ShapeDtypeStruct((blocks, d), jnp.float32)],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="rms_norm_backward",
    )(h, scale, rstd, dy, *[dh] * added)
    return dx, partial.sum(axis=0)

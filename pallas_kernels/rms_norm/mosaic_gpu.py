"""Forward kernel of `rms_norm`: a warpgroup holds one row in registers, reads it once and writes it once."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import launch
from pallas_kernels.tuning import choice, config_for

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
WIDEST = 8192  # the backward kernel's sums take 64 registers a thread then
LANES = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    rows: int = choice(1, 2, 4, 8, 16)  # of a block, one after the other


def heuristic(m: int, d: int) -> Config:
    """Few rows a block while there are few of them, so that every core has some."""
    return Config(rows=max(1, min(4, m // 1024)))


def reasons(x, residual, scale, eps, offset) -> list[str]:
    """Why the kernel cannot serve a call."""
    found = []
    if x.dtype not in DTYPES:
        found.append(f"dtype {x.dtype}; accepted: bfloat16, float16, float32")
    if x.shape[1] % LANES or x.shape[1] > WIDEST:
        found.append(f"width {x.shape[1]}; accepted: multiples of {LANES} up to {WIDEST}")
    return found


def row_layout(width: int, dtype) -> plgpu.Layout:
    """A row spread over the warpgroup, in the widest loads that divide it evenly."""
    widest = 16 // jnp.dtype(dtype).itemsize
    vector = next(v for v in (8, 4, 2, 1) if v <= widest and width % (LANES * v) == 0)
    return plgpu.Layout.WG_STRIDED((width,), vec_size=vector)


def rms_norm_forward(x, residual, scale, eps, offset):
    """`(y, h, rstd [M])`; `h` is None without a residual."""
    m, d = x.shape
    rows = config_for("rms_norm_forward", heuristic(m, d), m=m, d=d, dtype=x.dtype).rows
    layout = row_layout(d, x.dtype)
    added = residual is not None

    def body(x_ref, *refs):
        scale_ref, y_ref, rstd_ref, *h_ref = refs[added:]
        weight = plgpu.load(scale_ref, layout=layout)
        weight = weight.astype(jnp.float32) + offset if offset else weight.astype(x.dtype)

        @pl.loop(0, jnp.minimum(rows, m - lax.axis_index("block") * rows))
        def _(i):
            row = lax.axis_index("block") * rows + i
            h = plgpu.load(x_ref.at[row], layout=layout)
            if added:
                h += plgpu.load(refs[0].at[row], layout=layout)
                h_ref[0][row] = h
            h = h.astype(jnp.float32)
            rstd = lax.rsqrt(jnp.sum(h * h) * (1 / d) + eps)
            unit = h * rstd
            y_ref[row] = (unit * weight if offset else unit.astype(x.dtype) * weight).astype(x.dtype)
            rstd_ref[row] = rstd

    row = jax.ShapeDtypeStruct((m, d), x.dtype)
    y, rstd, *h = launch.kernel(
        body,
        out_type=[row, jax.ShapeDtypeStruct((m,), jnp.float32)] + [row] * added,
        grid=(pl.cdiv(m, rows),),
        grid_names=("block",),
        kernel_name="rms_norm_forward",
    )(x, *[residual] * added, scale)
    return y, h[0] if added else None, rstd

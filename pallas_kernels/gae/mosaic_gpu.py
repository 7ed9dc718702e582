"""Kernel of `gae`: a thread holds one row's carry in registers and walks its positions from the last to the first.

Rows lie along lanes, so arrays are transposed to `[T, B]`; XLA fuses this with what made them. Positions are loaded
`steps` at a time, before the first of them is needed: the walk would wait for memory at each of them otherwise.

The value after the last token comes as one more position, whose reward it is as well: its advantage is 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import launch
from pallas_kernels.tuning import choice, config_for

LANES = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    steps: int = choice(4, 8, 16, 32)  # positions in flight


def reasons(r, v, mask, gamma, lam, next_v) -> list[str]:
    """Why the kernel cannot serve a call."""
    return [] if r.dtype == jnp.float32 else [f"dtype {r.dtype}; accepted: float32"]


def gae_forward(r, v, mask, gamma, lam, next_v):
    """As `reference.gae_scan`."""
    b, t = r.shape
    steps = config_for("gae_forward", Config(steps=min(32, pl.next_power_of_2(t + 1))), b=b, t=t).steps
    lanes = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)

    def body(r_ref, v_ref, mask_ref, discount_ref, adv_ref):
        rows = pl.ds(lax.axis_index("rows") * LANES, LANES)
        gamma, decay = discount_ref[0], discount_ref[1]

        def load(ref, *index):
            return plgpu.load(ref.at[(*index, rows)], layout=lanes)

        def walk(i, carry):
            next_adv, after = carry
            times = [r_ref.shape[0] - 1 - i * steps - j for j in range(steps)]
            loaded = [(load(r_ref, t), load(v_ref, t), load(mask_ref, t) != 0) for t in times]
            for t, (r, v, mask) in zip(times, loaded, strict=True):
                adv = r + gamma * after - v + decay * next_adv
                adv_ref[t, rows] = adv
                next_adv, after = jnp.where(mask, adv, next_adv), jnp.where(mask, v, after)
            return next_adv, after

        nothing = plgpu.layout_cast(jnp.zeros((LANES,), jnp.float32), lanes)
        lax.fori_loop(0, r_ref.shape[0] // steps, walk, (nothing, nothing))

    def time_first(x, last):
        return jnp.pad(jnp.concatenate([x.T, last[None]]), ((0, -(t + 1) % steps), (0, -b % LANES)))

    out = launch.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((pl.cdiv(t + 1, steps) * steps, pl.cdiv(b, LANES) * LANES), jnp.float32),
        grid=(pl.cdiv(b, LANES),),
        grid_names=("rows",),
        kernel_name="gae_forward",
    )(
        time_first(r, next_v),
        time_first(v, next_v),
        time_first(mask.astype(jnp.int8), jnp.ones(b, jnp.int8)),
        jnp.stack([gamma, gamma * lam]),
    )
    return out[:t, :b].T

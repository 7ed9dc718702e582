"""Root-mean-square normalisation, with the addition to the residual stream before it."""

from functools import partial
from typing import NamedTuple, overload

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, Operation, hopper_kernel
from pallas_kernels.rms_norm import mosaic_gpu, mosaic_gpu_vjp
from pallas_kernels.rms_norm.reference import rms_norm_reference


class Normed(NamedTuple):
    """Result with a residual, both in the dtype of `x`."""

    y: Float[Array, "*M D"]  # normalised
    h: Float[Array, "*M D"]  # x + residual


@overload
def rms_norm(
    x: Array,
    scale: Array,
    residual: None = None,
    *,
    eps: float = ...,
    offset: float = ...,
    implementation: str | None = ...,
) -> Array: ...
@overload
def rms_norm(
    x: Array, scale: Array, residual: Array, *, eps: float = ..., offset: float = ..., implementation: str | None = ...
) -> Normed: ...
def rms_norm(
    x: Float[Array, "*M D"],
    scale: Float[Array, " D"],
    residual: Float[Array, "*M D"] | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "*M D"] | Normed:
    """`h / sqrt(mean(h^2) + eps) * (scale + offset)` with `h = x + residual`; statistics in float32.

    Equivalent to

        h = x if residual is None else x + residual
        unit = h.astype(float32) * rsqrt(mean(h.astype(float32) ** 2, -1, keepdims=True) + eps)
        y = unit.astype(x.dtype) * scale                                if offset == 0
        y = (unit * (scale.astype(float32) + offset)).astype(x.dtype)   otherwise

    Args:
      x: rows to normalise.
      scale: one weight a column.
      residual: is added first; the sum is returned too, for the residual stream.
      eps: keeps a row of zeros finite.
      offset: of the scale; 1 for Gemma.
      implementation: "mosaic_gpu", "xla", or None for the first of them that can serve the call.

    Returns:
      `y`, or `(y, h)` with a residual.

    Gradients flow to `x`, `scale` and `residual`.

    Raises:
      ValueError: shapes or dtypes that do not belong together, an unknown implementation.
      NotImplementedError: the named implementation cannot serve the call; all reasons.

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    if x.ndim < 1 or scale.shape != x.shape[-1:]:
        raise ValueError(f"x {x.shape} and scale {scale.shape} do not fit [*M, D], [D]")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"residual {residual.dtype}{residual.shape} is not like x {x.dtype}{x.shape}")
    rows, added = x.reshape(-1, x.shape[-1]), None if residual is None else residual.reshape(-1, x.shape[-1])
    y, h = OPERATION(implementation, rows, added, scale, eps, offset)
    y, h = y.reshape(x.shape), h.reshape(x.shape)
    return y if residual is None else Normed(y, h)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _mosaic(x, residual, scale, eps, offset):
    return _forward(x, residual, scale, eps, offset)[0]


def _forward(x, residual, scale, eps, offset):
    y, h, rstd = mosaic_gpu.rms_norm_forward(x, residual, scale, eps, offset)
    h = x if h is None else checkpoint_name(h, "residual")
    rstd = checkpoint_name(rstd, "rstd")
    return (y, h), (h, scale, rstd, residual is not None)


def _backward(eps, offset, residuals, cotangents):
    h, scale, rstd, added = residuals
    dy, dh = cotangents
    dx, dscale = mosaic_gpu_vjp.rms_norm_backward(h, scale, rstd, dy, dh if added else None, offset)
    return dx, dx if added else None, dscale.astype(scale.dtype)


_mosaic.defvjp(_forward, _backward)

OPERATION = Operation(
    "rms_norm",
    {
        "mosaic_gpu": hopper_kernel(_mosaic, mosaic_gpu.reasons),
        "xla": Implementation(rms_norm_reference),
    },
)

"""Plain truth for `quantized_matmul` and its gradient, and what XLA runs where the kernel cannot.

Half-precision operands meet a transient of the whole matrix in their own dtype; float32 ones meet it in parts.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized_matmul.formats import Quantized, dequantize

PART = 1 << 22  # elements of a float32 matrix that exist at a time


def quantized_matmul_reference(x: jax.Array, w: Quantized) -> jax.Array:
    """`x [M, K] @ dequantize(w).T`, float32 accumulation, in the dtype of `x`."""

    def of(part: Quantized) -> jax.Array:
        return _product(x, dequantize(part, x.dtype), contracted=1).astype(x.dtype)

    parts = _parts(w, x.dtype)
    if parts == 1:
        return of(w)
    return jnp.moveaxis(lax.map(of, _split(w, parts)), 0, 1).reshape(x.shape[0], -1)


def input_gradient(dy: jax.Array, w: Quantized) -> jax.Array:
    """`dy [M, N] @ dequantize(w)`, float32 accumulation, in the dtype of `dy`."""
    parts = _parts(w, dy.dtype)
    if parts == 1:
        return _product(dy, dequantize(w, dy.dtype), contracted=0).astype(dy.dtype)

    def add(dx: jax.Array, both: tuple[jax.Array, Quantized]) -> tuple[jax.Array, None]:
        dy_part, part = both
        return dx + _product(dy_part, dequantize(part, dy.dtype), contracted=0), None

    dy_parts = jnp.moveaxis(dy.reshape(dy.shape[0], parts, -1), 1, 0)
    zero = jnp.zeros((dy.shape[0], w.shape[1]), jnp.float32)
    return lax.scan(add, zero, (dy_parts, _split(w, parts)))[0].astype(dy.dtype)


def _product(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)


def _parts(w: Quantized, dtype: jnp.dtype) -> int:
    """Into how many equal parts of outputs the matrix is cut."""
    n, k = w.shape
    if dtype.itemsize < 4:
        return 1
    return next(p for p in range(1, n + 1) if n % p == 0 and (n // p * k <= PART or p == n))


def _split(w: Quantized, parts: int) -> Quantized:
    """Parts of the outputs, on a new leading axis."""

    def split(x: jax.Array, axis: int) -> jax.Array:
        axis += x.ndim
        return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]), axis, 0)

    return Quantized(
        split(w.codes, -2),
        split(w.scale, -1),
        None if w.block_scale is None else split(w.block_scale, -1),
        None if w.offset is None else jnp.broadcast_to(w.offset[None], (parts,)),
        w.format,
    )

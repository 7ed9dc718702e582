"""Weights of 8 or 4 bits in place of matrices: what the rest of a model has to know of them.

A kernel is an array `[*L, in, out]`, or a `pallas_kernels.Quantized` that stands for one. Those are frozen: gradients
flow through them to activations, never to them.
"""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import Quantized, dequantize, quantize, quantize_cache, quantized_matmul
from pallas_kernels.quantized_matmul.formats import FORMATS, GROUP
from rapidfire_jax.errors import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedInputs:
    """int8 weights whose inputs are rounded to int8 too, with a scale for each token: a product of integers."""

    weights: Quantized


type Kernel = Float[Array, "*L in out"] | Quantized


def shape_of(kernel: Kernel) -> tuple[int, ...]:
    """`(*L, in, out)`."""
    if isinstance(kernel, Quantized):
        *layers, out_features, in_features = kernel.shape
        return (*layers, in_features, out_features)
    return kernel.shape


def multiply(x: Float[Array, "*M in"], kernel: Kernel | RoundedInputs) -> Float[Array, "*M out"]:
    """`x @ kernel` in the dtype of `x`. Gradients flow to `x` that is not rounded, and to a kernel that is an array."""
    if isinstance(kernel, RoundedInputs):
        codes, scales = quantize_cache(x)
        weights = kernel.weights
        y = jnp.einsum("...k,nk->...n", codes, weights.codes, preferred_element_type=jnp.int32).astype(jnp.float32)
        return (y * (scales[..., None] * jnp.broadcast_to(weights.scale, y.shape))).astype(x.dtype)
    if isinstance(kernel, Quantized):
        return quantized_matmul(x, kernel)
    return x @ kernel.astype(x.dtype)


def dense(kernel: Kernel, dtype: DTypeLike) -> Float[Array, "*L in out"]:
    """The kernel as an array."""
    if isinstance(kernel, Quantized):
        return jnp.swapaxes(dequantize(kernel, dtype), -1, -2)
    return kernel.astype(dtype)


def cast(tree: Any, dtype: DTypeLike) -> Any:
    """Every array of a tree of parameters in another dtype; quantised ones stay as they are."""
    return jax.tree.map(lambda x: x if _is_quantized(x) else x.astype(dtype), tree, is_leaf=_is_quantized)


def round_inputs(tree: Any) -> Any:
    """A tree of parameters for products of integers; every quantised kernel in it must be int8."""
    return jax.tree.map(lambda x: RoundedInputs(x) if _is_quantized(x) else x, tree, is_leaf=_is_quantized)


def is_quantized(tree: Any) -> bool:
    """Whether a tree of parameters has quantised ones."""
    return any(map(_is_quantized, jax.tree.leaves(tree, is_leaf=_is_quantized)))


def check_format(format: str | None, where: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuses a format that the kernels among `shapes`, `(*L, in, out)` by path, cannot be stored in.

    Raises:
      InputError: an unknown format, or a width that it cannot cut into groups.
    """
    if format is None:
        return
    if format not in FORMATS:
        raise InputError(f"quantize {format!r} is not supported; accepted: {', '.join(FORMATS)}")
    odd = {path: shape[-2] for path, shape in shapes.items() if path.endswith(".kernel") and shape[-2] % GROUP}
    if format != "int8" and odd:
        path, width = next(iter(odd.items()))
        raise InputError(
            f"{where}: quantize {format!r} takes inputs in groups of {GROUP}; {path} has {width} inputs; accepted: int8"
        )


class QuantizedBuffer:
    """A quantised parameter that is filled one matrix at a time, on the host."""

    def __init__(self, shape: tuple[int, ...], format: str):
        *layers, in_features, out_features = shape
        one = jax.ShapeDtypeStruct((*layers, out_features, in_features), jnp.float32)
        self.format = format
        self.value = jax.tree.map(
            lambda x: np.empty(x.shape, x.dtype), jax.eval_shape(partial(quantize, format=format), one)
        )

    def fill(self, layer: int | None, kernel: Any) -> None:
        """Rounds the matrix `[in, out]` of a layer, or takes one that is in the format already."""
        if not isinstance(kernel, Quantized):
            kernel = _rounding(self.format)(np.ascontiguousarray(kernel.T))
        assert kernel.format == self.format
        for buffer, part in zip(jax.tree.leaves(self.value), jax.tree.leaves(kernel), strict=True):
            buffer[layer] = part


def take_outputs(kernel: Quantized, rows: np.ndarray) -> Quantized:
    """Some outputs of one matrix."""

    def take(x: Any, axis: int) -> Any:
        return None if x is None else np.take(np.asarray(x), rows, axis=axis)

    codes = take(kernel.codes, 0 if kernel.format == "int8" else 1)
    return Quantized(codes, take(kernel.scale, -1), take(kernel.block_scale, -1), kernel.offset, kernel.format)


@cache
def _rounding(format: str) -> Any:
    return jax.jit(partial(quantize, format=format))


def _is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)

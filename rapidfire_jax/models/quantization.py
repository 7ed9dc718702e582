"""Weights of 8 or 4 bits in place of matrices: what the rest of a model has to know of them.

A kernel is an array `[*L, in, out]`, or a `pallas_kernels.Quantized` that stands for one. So are the tables of the
vocabulary `[V, D]`, embedding and head, in int8 with a scale for each token. Those are frozen: gradients flow through
them to activations, never to them.
"""

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import Quantized, dequantize, quantize, quantize_cache, quantized_matmul
from pallas_kernels.quantized_matmul.formats import FORMATS, GROUP
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.products import matmul, matmul_transposed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedInputs:
    """int8 weights whose inputs are rounded to int8 too, with a scale for each token: a product of integers."""

    weights: Quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputsFirst:
    """A kernel turned around for `matmul_transposed`: what decoding on a CPU reads."""

    weights: Float[Array, "*L out in"]


type Kernel = Float[Array, "*L in out"] | Quantized
type Table = Float[Array, "V D"] | Quantized
TABLES = ("embedding", "lm_head")


class Formats(NamedTuple):
    """Which parameters are quantised; None: as they are stored."""

    kernels: str | None = None
    tables: str | None = None

    def of(self, path: str) -> str | None:
        """Format of a parameter, None if it is an array."""
        return self.tables if path in TABLES else self.kernels if path.endswith(".kernel") else None


AS_THEY_ARE = Formats()


def shape_of(kernel: Kernel) -> tuple[int, ...]:
    """`(*L, in, out)`."""
    if isinstance(kernel, Quantized):
        *layers, out_features, in_features = kernel.shape
        return (*layers, in_features, out_features)
    return kernel.shape


def multiply(x: Float[Array, "*M in"], kernel: Kernel | RoundedInputs | OutputsFirst) -> Float[Array, "*M out"]:
    """`x @ kernel` in the dtype of `x`. Gradients flow to `x` that is not rounded, and to a kernel that is an array."""
    if isinstance(kernel, RoundedInputs):
        codes, scales = quantize_cache(x)
        weights = kernel.weights
        y = jnp.einsum("...k,nk->...n", codes, weights.codes, preferred_element_type=jnp.int32).astype(jnp.float32)
        return (y * (scales[..., None] * jnp.broadcast_to(weights.scale, y.shape))).astype(x.dtype)
    if isinstance(kernel, Quantized):
        return quantized_matmul(x, kernel)
    if isinstance(kernel, OutputsFirst):
        return matmul_transposed(x, kernel.weights.astype(x.dtype))
    return matmul(x, kernel.astype(x.dtype))


def dense(kernel: Kernel, dtype: DTypeLike) -> Float[Array, "*L in out"]:
    """The kernel as an array."""
    if isinstance(kernel, Quantized):
        return jnp.swapaxes(dequantize(kernel, dtype), -1, -2)
    return kernel.astype(dtype)


def rows_of(table: Table, tokens: Int[Array, "*M"], dtype: DTypeLike) -> Float[Array, "*M D"]:
    """Embeddings of some tokens."""
    if isinstance(table, Quantized):
        rows, scale = table.codes[tokens].astype(jnp.float32), table.scale[tokens]
        return (rows * jnp.broadcast_to(scale[..., None], rows.shape)).astype(dtype)
    return table[tokens].astype(dtype)


def dense_table(table: Table, dtype: DTypeLike) -> Float[Array, "V D"]:
    """The table as an array."""
    return dequantize(table, dtype) if isinstance(table, Quantized) else table.astype(dtype)


def logits_of(hidden: Float[Array, "*M D"], table: Table) -> Float[Array, "*M V"]:
    """`hidden @ table.T`, accumulated in float32. Scales of a quantised table come after the product, which so reads
    a byte a number.
    """
    product = partial(matmul_transposed, hidden, dtype=jnp.float32)
    if isinstance(table, Quantized):
        logits = product(table.codes.astype(hidden.dtype))
        return logits * jnp.broadcast_to(table.scale, logits.shape)
    return product(table.astype(hidden.dtype))


def cast(tree: Any, dtype: DTypeLike) -> Any:
    """Every array of a tree of parameters in another dtype; quantised ones stay as they are."""
    return jax.tree.map(lambda x: x if _is_quantized(x) else x.astype(dtype), tree, is_leaf=_is_quantized)


def outputs_first(tree: Any) -> Any:
    """A tree of parameters whose kernels, if they are arrays, are turned around."""

    def change(path: tuple, x: Any) -> Any:
        is_kernel = any(getattr(key, "key", None) == "kernel" for key in path)
        return OutputsFirst(jnp.swapaxes(x, -1, -2)) if is_kernel and isinstance(x, jax.Array) else x

    return jax.tree.map_with_path(change, tree, is_leaf=lambda x: _is_quantized(x) or isinstance(x, RoundedInputs))


def round_inputs(tree: Any) -> Any:
    """A tree of parameters for products of integers; every quantised kernel in it must be int8. Tables stay."""

    def change(path: tuple, x: Any) -> Any:
        is_table = any(str(getattr(key, "key", key)) in TABLES for key in path)
        return RoundedInputs(x) if _is_quantized(x) and not is_table else x

    return jax.tree.map_with_path(change, tree, is_leaf=_is_quantized)


def is_quantized(tree: Any) -> bool:
    """Whether a tree of parameters has quantised ones."""
    return any(map(_is_quantized, jax.tree.leaves(tree, is_leaf=_is_quantized)))


def check_formats(formats: Formats, where: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuses a format that the kernels among `shapes`, `(*L, in, out)` by path, or the tables cannot be stored in.

    Raises:
      InputError: an unknown format, or a width that it cannot cut into groups.
    """
    if formats.tables not in (None, "int8"):
        raise InputError(f"quantize_vocabulary {formats.tables!r} is not supported; accepted: int8")
    format = formats.kernels
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


def quantized_shape(path: str, shape: tuple[int, ...], format: str) -> Quantized:
    """Shapes and dtypes of a parameter in a format."""
    *layers, rows, columns = shape
    outputs_first = (rows, columns) if path in TABLES else (columns, rows)
    matrix = jax.ShapeDtypeStruct((*layers, *outputs_first), jnp.float32)
    return jax.eval_shape(partial(quantize, format=format), matrix)


class QuantizedBuffer:
    """A quantised parameter that is filled one matrix at a time, on the host."""

    def __init__(self, path: str, shape: tuple[int, ...], format: str):
        self.path = path
        self.value = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), quantized_shape(path, shape, format))

    def fill(self, layer: int | None, matrix: Any) -> None:
        """Rounds the matrix of a layer or the table, or takes a matrix that is in the format already."""
        if not isinstance(matrix, Quantized):
            outputs_first = matrix if self.path in TABLES else matrix.T
            matrix = _rounding(self.value.format)(np.ascontiguousarray(outputs_first))
        assert matrix.format == self.value.format
        for buffer, part in zip(jax.tree.leaves(self.value), jax.tree.leaves(matrix), strict=True):
            buffer[... if layer is None else layer] = part


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

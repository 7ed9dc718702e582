"""Checkpoints <-> models: which stored tensor holds which parameter, and filling a model from them.

Stored matrices lie one a layer, most of them `[out, in]`; ours are `[in, out]`, stacked over layers. A parameter is
filled tensor by tensor in its final dtype or quantised format, so that the host never holds more than that parameter
and one stored tensor beside what is already in place.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels import Quantized, dequantize
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.decoder import AS_STORED, Decoder, Precision
from rapidfire_jax.models.families import Family
from rapidfire_jax.models.quantization import AS_THEY_ARE, Formats, Kernel, QuantizedBuffer, check_formats, take_outputs

TILE = 128  # rows and columns

type Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


class Checkpoint(Protocol):
    """Stored tensors by name, read one by one."""

    where: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    format: str | None  # in which matrices of layers come quantised

    def read(self, name: str) -> np.ndarray | Quantized:
        """Tensor `name` in `shapes[name]`, in memory of its own; a matrix may come quantised."""
        ...


class Stored(NamedTuple):
    """A stored tensor: the parameters it holds, and the layer they belong to if they are stacked."""

    paths: tuple[str, ...]
    layer: int | None


def parameters(model: Decoder) -> dict[str, Kernel]:
    """Dotted path -> array of everything in `model`, adapters and value head included; kernels may be quantised."""
    return {_dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assemble[M: Decoder](kind: type[M], config: DecoderConfig, arrays: Mapping[str, Kernel], precision: Precision) -> M:
    """A model from arrays by dotted path; others than a plain `kind` has are left out."""
    graphdef, leaves = _structure(kind, config, precision)
    filled = [(path, leaf.replace(arrays[_dotted(path)])) for path, leaf in leaves]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def stored_tensors(family: Family, paths: Mapping[str, object], num_layers: int) -> dict[str, Stored]:
    """Name of every stored tensor of a model with these parameters -> what it holds."""
    patterns: dict[str, tuple[str, ...]] = {}
    for path, pattern in family.names.items():
        if path in paths:
            patterns[pattern] = (*patterns.get(pattern, ()), path)
    return {
        pattern.format(layer): Stored(held, layer)
        for pattern, held in patterns.items()
        for layer in (range(num_layers) if held[0].startswith("blocks.") else (None,))
    }


def stored_shapes(kind: type[Decoder], family: Family, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name of every stored tensor of a model -> its shape."""
    ours = shapes_of(kind, config, AS_STORED)
    expected = stored_tensors(family, ours, config.num_layers)
    return {name: _stored_shape(family, stored, ours) for name, stored in expected.items()}


def to_stored(family: Family, path: str, parts: list[np.ndarray], heads: int) -> np.ndarray:
    """The stored tensor that holds `parts`, all in our layout; `path` is the first one's."""
    if family.interleaved and len(parts) > 1:
        by_head = [part.reshape(*part.shape[:-1], heads, -1) for part in parts]
        value = np.stack(by_head, axis=-2).reshape(*parts[0].shape[:-1], -1)
    else:
        value = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    if path == "score":
        return value[None]
    return np.ascontiguousarray(value.T if _is_swapped(family, path) else value)


def from_stored(family: Family, path: str, value: np.ndarray, widths: list[int], heads: int) -> list[np.ndarray]:
    """Views of the parts of a stored tensor, `widths` wide, in our layout: the inverse of `to_stored`."""
    if path == "score":
        return [value[0]]
    value = value.T if _is_swapped(family, path) else value
    if len(widths) == 1:
        return [value]
    if family.interleaved:
        by_head = value.reshape(*value.shape[:-1], heads, len(widths), -1)
        return [by_head[..., i, :].reshape(*value.shape[:-1], -1) for i in range(len(widths))]
    return np.split(value, np.cumsum(widths)[:-1], axis=-1)


def load[M: Decoder](
    kind: type[M],
    checkpoint: Checkpoint,
    family: Family,
    config: DecoderConfig,
    *,
    dtype: DTypeLike | None,
    precision: Precision,
    formats: Formats = AS_THEY_ARE,
    placement: Placement | None = None,
) -> M:
    """A model of class `kind` with the tensors of a checkpoint.

    Args:
      kind: `CausalLM` or `RewardModel`.
      checkpoint: where they are read from.
      family: names and layout of the stored tensors.
      config: fixes the shapes.
      dtype: of the parameters; None: as they are stored.
      precision: in what the model computes.
      formats: in which matrices are quantised.
      placement: sharding of a parameter by its path and shape; None: the default device.

    Raises:
      InputError: missing, unexpected and mis-shaped tensors, all in one message.
    """
    ours = shapes_of(kind, config, precision)
    expected = stored_tensors(family, ours, config.num_layers)
    held = _find(checkpoint, family, config, expected, ours)
    check_formats(formats, str(checkpoint.where), ours)
    formats = formats._replace(kernels=formats.kernels or checkpoint.format)

    arrays: dict[str, Kernel] = {}
    groups: dict[tuple[str, ...], dict[str, Stored]] = {}
    for name, stored in expected.items():
        groups.setdefault(stored.paths, {})[name] = stored
    for paths, group in groups.items():
        kinds = {checkpoint.dtypes[held[name]] for name in group}
        target = np.dtype(dtype if dtype is not None else kinds.pop() if len(kinds) == 1 else np.float32)
        target = np.dtype(np.float32) if target == np.float64 else target
        buffers = [_buffer(path, ours[path], formats.of(path), target) for path in paths]
        for name, stored in group.items():
            value = checkpoint.read(held[name])
            if not _is_finite(value):
                warnings.warn(f"{checkpoint.where}: tensor {held[name]!r} holds NaN or infinite values", stacklevel=2)
            widths = [ours[path][-1] for path in paths]
            parts = _parts_of(family, paths[0], value, widths, config.num_heads, formats.of(paths[0]))
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.fill(stored.layer, part)
            del value, parts
        for path, buffer in zip(paths, buffers, strict=True):
            arrays[path] = jax.tree.map(
                lambda x, path=path: jax.device_put(x, None if placement is None else placement(path, x.shape)),
                buffer.value,
            )
        del buffers
    return assemble(kind, config, arrays, precision)


def _buffer(path: str, shape: tuple[int, ...], format: str | None, dtype: np.dtype) -> "Buffer | QuantizedBuffer":
    return Buffer(shape, dtype) if format is None else QuantizedBuffer(path, shape, format)


def _parts_of(
    family: Family, path: str, value: np.ndarray | Quantized, widths: list[int], heads: int, format: str | None
) -> list[Any]:
    """The parts of a stored tensor in our layout; quantised if it is stored in the format that is wanted."""
    if isinstance(value, Quantized):
        if value.format == format and _is_swapped(family, path):
            numbers = np.arange(value.shape[0])[:, None]  # of outputs, as the one column of a matrix
            return [take_outputs(value, rows[0]) for rows in from_stored(family, path, numbers, widths, heads)]
        value = np.asarray(dequantize(value))
    return from_stored(family, path, value, widths, heads)


def _find(
    checkpoint: Checkpoint,
    family: Family,
    config: DecoderConfig,
    expected: Mapping[str, Stored],
    ours: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Under which name the checkpoint holds each expected tensor, once all are known to be there and to fit."""
    head = family.names["lm_head"]
    held, unexpected = {}, []
    for name in checkpoint.shapes:
        known = name if name in expected else family.trunk + name  # a bare trunk was saved without its prefix
        if known in expected:
            held[known] = name
        elif name == head and config.tie_embeddings:
            _compare_tied(checkpoint, head, family.names["embedding"])
        elif not name.endswith(family.ignored):
            unexpected.append(name)
    problems = [f"missing: {name}" for name in expected if name not in held]
    problems += [f"unexpected: {name}" for name in unexpected]
    for name, stored in expected.items():
        wanted = _stored_shape(family, stored, ours)
        if name in held and checkpoint.shapes[held[name]] != wanted:
            found = list(checkpoint.shapes[held[name]])
            problems.append(f"shape of {name}: found {found}, expected {list(wanted)}")
    if problems:
        raise InputError("\n  ".join([f"{checkpoint.where}: the weights do not fit the configuration:", *problems]))
    return held


def _compare_tied(checkpoint: Checkpoint, head: str, embedding: str) -> None:
    """Warns of a stored head that is not the embedding although the configuration ties them."""
    stored: list[Any] = [checkpoint.read(name) for name in (head, embedding) if name in checkpoint.shapes]
    if len(stored) == 2 and not np.array_equal(*stored):
        warnings.warn(
            f"{checkpoint.where}: {head} differs from {embedding}, but the configuration ties them; the embedding is "
            "used for both",
            stacklevel=2,
        )


def _stored_shape(family: Family, stored: Stored, ours: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    shapes = [ours[path] if stored.layer is None else ours[path][1:] for path in stored.paths]
    shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    if stored.paths[0] == "score":
        return (1, *shape)
    return shape[::-1] if _is_swapped(family, stored.paths[0]) else shape


def _is_swapped(family: Family, path: str) -> bool:
    return path.endswith(".kernel") and not family.transposed


@functools.cache
def _structure(
    kind: type[Decoder], config: DecoderConfig, precision: Precision
) -> tuple[nnx.GraphDef, list[tuple[tuple, nnx.Variable]]]:
    """Graph definition of a plain model, and its parameters with shapes in place of arrays."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(config, precision=precision, rngs=nnx.Rngs(0))))
    return graphdef, list(nnx.to_flat_state(state))


def shapes_of(kind: type[Decoder], config: DecoderConfig, precision: Precision) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every parameter of a plain model."""
    return {_dotted(path): leaf.get_value().shape for path, leaf in _structure(kind, config, precision)[1]}


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


class Buffer:
    """A parameter that is filled layer by layer, on the host."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.value = _aligned(shape, dtype)

    def fill(self, layer: int | None, part: Any) -> None:
        """Takes the array of a layer, or the whole of a parameter that is not stacked."""
        _copy(self.value[... if layer is None else layer], part)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="weights")


def _copy(into: np.ndarray, values: np.ndarray) -> None:
    """Fills an array. A matrix that lies transposed is copied by tiles that fit into a core's cache, in threads."""
    if values.ndim != 2 or values.flags.c_contiguous or values.dtype != into.dtype:
        into[...] = values
        return
    if values.dtype == "bfloat16":  # whose copy would hold the interpreter's lock
        into, values = into.view(np.uint16), values.view(np.uint16)

    def copy_rows(rows: slice) -> None:
        for start in range(0, values.shape[1], TILE):
            columns = slice(start, start + TILE)
            into[rows, columns] = values[rows, columns]

    list(_threads().map(copy_rows, (slice(start, start + TILE) for start in range(0, len(values), TILE))))


def _is_finite(value: np.ndarray | Quantized) -> bool:
    """Whether no value is NaN or infinite, looked at in slices that stay small."""
    if isinstance(value, Quantized):
        return all(_is_finite(np.asarray(x)) for x in (value.block_scale, value.offset))
    flat = value.ravel(order="K")
    if value.dtype == "bfloat16":  # NumPy knows the bits alone quickly
        flat, exponent = flat.view(np.uint16), np.uint16(0x7F80)
        return all((flat[i : i + 2**18] & exponent != exponent).all() for i in range(0, len(flat), 2**18))
    return all(np.isfinite(flat[i : i + 2**20]).all() for i in range(0, len(flat), 2**20))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary: XLA on CPU then takes the memory as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)

"""Reads GGUF files (versions 2 and 3, little-endian): metadata, the tensor table, and tensors as float32.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf` package gives the same
values, but takes seconds for the metadata of a small model.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.binary import Cursor, mapped
from rapidfire_jax.models.gguf_blocks import BLOCKS, decode

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# Codes of metadata values; 8 is a string and 9 an array.
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9

# Codes of tensor types, for messages; those that can be read have an entry in `BLOCKS`.
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and how it is encoded."""

    type: str
    shape: tuple[int, ...]  # outermost axis first, as in NumPy
    offset: int  # bytes from the start of the file
    blocks: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensor table of a file; tensors are read one by one."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def dequantize(self, name: str) -> np.ndarray:
        """Tensor `name` as float32, in `tensors[name].shape`."""
        info = self.tensors[name]
        # Read, not mapped: the pages of a mapping would stay resident beside the result.
        raw = np.fromfile(self.path, BLOCKS[info.type][1], info.blocks, offset=info.offset)
        if len(raw) < info.blocks:
            raise InputError(f"{self.path}: the data of tensor {name!r} is cut short since the file was opened")
        return decode(raw, info.type).reshape(info.shape)


def read_gguf(path: str | Path) -> GGUFFile:
    """Opens a GGUF file and checks that every tensor is whole and of a type that can be read.

    Raises:
      InputError: not a GGUF file, cut short, inconsistent, or with tensors of another type.
    """
    path = Path(path)
    with mapped(path) as data:
        return _parse(path, _Cursor(path, data))


class _Cursor(Cursor):
    """Reads the values of the metadata."""

    def string(self, what: str) -> str:
        return self.text(self.number("<Q", what), what)

    def value(self, kind: int, what: str) -> Any:
        if kind in SCALARS:
            return self.scalars(kind, 1, what)[0]
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            raise InputError(f"{self.path}: {what} has unknown value type {kind}; known: 0 to 12")
        kind, count = self.number("<I", what), self.number("<Q", what)
        if kind in SCALARS:
            return self.scalars(kind, count, what)
        return [self.value(kind, what) for _ in range(count)]

    def scalars(self, kind: int, count: int, what: str) -> list[Any]:
        dtype = np.dtype(SCALARS[kind])
        start = self.take(count * dtype.itemsize, what)
        return np.frombuffer(self.data[start : self.at], dtype).tolist()


def _parse(path: Path, cursor: _Cursor) -> GGUFFile:
    cursor.take(len(MAGIC), "the magic number")
    if (magic := cursor.data[: len(MAGIC)]) != MAGIC:
        raise InputError(f"{path}: not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}")
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        found = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
        raise InputError(f"{path}: {found} is not supported; accepted: little-endian, versions 2 and 3")
    tensor_count, metadata_count = cursor.number("<Q", "the header"), cursor.number("<Q", "the header")
    metadata = {}
    for i in range(metadata_count):
        key = cursor.string(f"key {i} of the metadata")
        metadata[key] = cursor.value(cursor.number("<I", f"metadata {key!r}"), f"metadata {key!r}")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise InputError(f"{path}: general.alignment is {alignment!r}; expected a positive number of bytes")
    table = dict(_table_row(cursor, i) for i in range(tensor_count))
    if len(table) < tensor_count:
        raise InputError(f"{path}: the tensor table names {tensor_count - len(table)} tensors twice")
    start = -(-cursor.at // alignment) * alignment
    _check_types(path, table)
    return GGUFFile(path, metadata, {name: _locate(cursor, name, *row, start) for name, row in table.items()})


def _table_row(cursor: _Cursor, i: int) -> tuple[str, tuple[tuple[int, ...], str, int]]:
    name = cursor.string(f"name of tensor {i} of the table")
    what = f"the table's row for tensor {name!r}"
    rank = cursor.number("<I", what)
    shape = tuple(cursor.number("<Q", what) for _ in range(rank))[::-1]
    code = cursor.number("<I", what)
    return name, (shape, TYPES.get(code, f"of code {code}"), cursor.number("<Q", what))


def _check_types(path: Path, table: dict[str, tuple[tuple[int, ...], str, int]]) -> None:
    refused: dict[str, list[str]] = {}
    for name, (_, kind, _) in table.items():
        if kind not in BLOCKS:
            refused.setdefault(kind, []).append(name)
    if refused:
        found = "; ".join(
            f"tensor {names[0]!r}{f' and {len(names) - 1} more' if names[1:] else ''}: type {kind}"
            for kind, names in refused.items()
        )
        raise InputError(f"{path}: cannot read {found}; accepted types: {', '.join(BLOCKS)}")


def _locate(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: str, offset: int, start: int) -> TensorInfo:
    values, block = BLOCKS[kind]
    row = shape[-1] if shape else 1
    if row % values:
        raise InputError(f"{cursor.path}: tensor {name!r} has rows of {row} values, not a multiple of {values}")
    info = TensorInfo(kind, shape, start + offset, math.prod(shape) // values)
    cursor.at = info.offset
    cursor.take(info.blocks * block.itemsize, f"the data of tensor {name!r}")
    return info

"""Reads safetensors files tensor by tensor into memory of their own: mapped pages of a file would stay resident."""

import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.sources import read_weight_map

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INTEGERS = {"U8": np.dtype("u1"), "I8": np.dtype("i1")}  # of quantised checkpoints
FILES = ("model.safetensors", "model.safetensors.index.json")
LONGEST_HEADER = 100_000_000  # bytes; the limit of the format


class Safetensors:
    """The tensors of one file, or of all shards of an index; bytes only where `integers` are wanted."""

    format: str | None = None

    def __init__(self, where: Path, files: list[Path], *, integers: bool = False):
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        kinds = DTYPES | INTEGERS if integers else DTYPES
        for path in files:
            for name, (dtype, shape, offset) in _table(path, kinds).items():
                if name in self.shapes:
                    raise InputError(f"{where}: tensor {name!r} is in {self._places[name][0].name} and in {path.name}")
                self.shapes[name], self.dtypes[name] = shape, dtype
                self._places[name] = path, offset

    def read(self, name: str) -> np.ndarray:
        """Tensor `name`, in the dtype it is stored in."""
        path, offset = self._places[name]
        shape = self.shapes[name]
        return np.fromfile(path, self.dtypes[name], math.prod(shape), offset=offset).reshape(shape)


def open_safetensors(folder: Path, *, integers: bool = False) -> Safetensors:
    """The weights in `model.safetensors`, or else in the shards of its index.

    Raises:
      InputError: a file cut short, or one that the index names and that is missing or outside the folder.
    """
    single, index = (folder / name for name in FILES)
    if single.exists():
        return Safetensors(folder, [single], integers=integers)
    weight_map = read_weight_map(index)
    found = Safetensors(folder, [folder / name for name in sorted(set(weight_map.values()))], integers=integers)
    absent = sorted(weight_map.keys() - found.shapes.keys())
    if absent:
        raise InputError(f"{index}: names tensors that its files do not hold: {', '.join(absent)}")
    return found


def _table(path: Path, kinds: dict[str, np.dtype]) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Dtype, shape and place of every tensor of a file, checked against its size."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a safetensors file: its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, entry, kinds, 8 + length, size) for name, entry in header.items()}


def _entry(
    path: Path, name: str, entry: Any, kinds: dict[str, np.dtype], start: int, size: int
) -> tuple[np.dtype, tuple[int, ...], int]:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: the header's entry for {name!r} is damaged: {entry!r}") from None
    if kind not in kinds:
        raise InputError(f"{path}: {name}: dtype {kind} cannot be read; accepted: {', '.join(kinds)}")
    wanted = math.prod(shape) * kinds[kind].itemsize
    if any(side < 0 for side in shape) or begin < 0 or end - begin != wanted:
        raise InputError(f"{path}: {name}: bytes {begin} to {end} do not hold {kind}{list(shape)}")
    if start + end > size:
        raise InputError(
            f"{path}: not a whole safetensors file: {name} should end at byte {start + end}, but there are {size}"
        )
    return kinds[kind], shape, start + begin

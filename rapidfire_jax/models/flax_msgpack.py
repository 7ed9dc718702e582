"""Reads checkpoints as the Flax classes of transformers 4 wrote them, array by array and by PyTorch's names.

`flax.serialization.to_bytes` writes nested maps as msgpack (https://github.com/msgpack/msgpack/blob/master/spec.md),
with arrays as extensions. A file is walked once to note where the bytes of every array lie; nothing else of it is
kept, and nothing is ever unpickled.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.binary import Cursor, mapped
from rapidfire_jax.models.sources import read_weight_map

FILES = SINGLE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
DTYPES = {np.dtype(d).name: np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
LEAVES = {"embedding": "weight", "scale": "weight", "kernel": "weight"}  # Flax -> PyTorch; others keep their name
ARRAY, SCALAR = 1, 3  # Flax's msgpack extensions, both packed as (shape, dtype, bytes)
CHUNKED = "__msgpack_chunked_array__"  # a key of the map that Flax puts in place of an array above 1 GB

# First byte of a msgpack value -> its kind, and its length (of an integer the value) or how that follows.
HEADS: dict[int, tuple[str, int | str]] = {
    **{n: ("integer", n) for n in range(128)},
    **{0x80 + n: ("map", n) for n in range(16)},
    **{0x90 + n: ("list", n) for n in range(16)},
    **{0xA0 + n: ("string", n) for n in range(32)},
    **{0xC4 + n: ("byte string", code) for n, code in enumerate((">B", ">H", ">I"))},
    **{0xC7 + n: ("extension", code) for n, code in enumerate((">B", ">H", ">I"))},
    **{0xCC + n: ("integer", code) for n, code in enumerate((">B", ">H", ">I", ">Q"))},
    **{0xD4 + n: ("extension", 2**n) for n in range(5)},
    **{0xD9 + n: ("string", code) for n, code in enumerate((">B", ">H", ">I"))},
    **{0xDC + n: ("list", code) for n, code in enumerate((">H", ">I"))},
    **{0xDE + n: ("map", code) for n, code in enumerate((">H", ">I"))},
    0xC0: ("nil", 0),
    0xC2: ("boolean", 0),
    0xC3: ("boolean", 1),
}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """Where an array lies: in one span of bytes, or in several if Flax cut it into chunks."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    spans: tuple[tuple[int, int], ...]  # start and length

    def read(self) -> np.ndarray:
        """The array, which is all that is held in memory."""
        array = np.empty(math.prod(self.shape), self.dtype)
        rest = memoryview(array.view(np.uint8))
        with open(self.file, "rb") as file:
            for start, length in self.spans:
                file.seek(start)
                if file.readinto(rest[:length]) < length:
                    raise InputError(f"{self.file}: cut short since it was opened: no {length} bytes at byte {start}")
                rest = rest[length:]
        return array.reshape(self.shape)


class FlaxMsgpack:
    """The arrays of one file, or of all shards of an index, by PyTorch's names and in PyTorch's order of axes."""

    format: str | None = None

    def __init__(self, where: Path, files: list[Path]):
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._arrays: dict[str, StoredArray] = {}
        self._kernels: set[str] = set()  # PyTorch's weights have their axes the other way round
        for file in files:
            for path, array in _stored_arrays(file):
                name = _torch_name(path)
                if name in self._arrays:
                    raise InputError(f"{file}: holds tensor {name!r} again, which is in {self._arrays[name].file}")
                self._arrays[name], self.dtypes[name], self.shapes[name] = array, array.dtype, array.shape
                if path.split("/")[-1] == "kernel":
                    self._kernels.add(name)
                    self.shapes[name] = array.shape[::-1]

    def read(self, name: str) -> np.ndarray:
        """Array `name` in the dtype it is stored in; a kernel is a transposed view of memory of its own.

        Raises:
          InputError: the file has become shorter.
        """
        array = self._arrays[name].read()
        return array.T if name in self._kernels else array


def open_flax_msgpack(folder: Path) -> FlaxMsgpack:
    """Finds the arrays of `flax_model.msgpack`, or of the shards that `flax_model.msgpack.index.json` names.

    Raises:
      InputError: no such file; one that is cut short or holds anything but maps of floating-point arrays; or an index
        that does not match its shards.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return FlaxMsgpack(single, [single])
    if not index.exists():
        raise InputError(f"{folder}: holds no {SINGLE} and no {INDEX}")
    weight_map = read_weight_map(index)
    found = FlaxMsgpack(index, sorted({folder / name for name in weight_map.values()}))
    if missing := [path for path in weight_map if _torch_name(path) not in found.shapes]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"{index}: names tensor {missing[0]!r}{more}, which none of its files holds")
    return found


def _torch_name(path: str) -> str:
    *modules, leaf = path.split("/")
    return ".".join([*modules, LEAVES.get(leaf, leaf)])


def _stored_arrays(path: Path) -> Iterator[tuple[str, StoredArray]]:
    """The arrays of a file, by their keys joined with "/"."""
    try:
        with mapped(path) as data:
            tree = _Walker(path, data).tree()
    except RecursionError:
        raise InputError(f"{path}: not a Flax checkpoint: its maps are nested too deeply") from None
    return _leaves(path, "", tree)


def _leaves(path: Path, name: str, tree: dict[str, Any]) -> Iterator[tuple[str, StoredArray]]:
    for key, value in tree.items():
        inner = _join(name, key)
        if isinstance(value, StoredArray):
            yield inner, value
        elif not isinstance(value, dict):
            raise InputError(f"{path}: {inner!r} is the number {value}; expected an array or a map of arrays")
        elif CHUNKED in value:
            yield inner, _whole(path, inner, value)
        else:
            yield from _leaves(path, inner, value)


def _join(name: str, key: str) -> str:
    return f"{name}/{key}" if name else key


def _whole(path: Path, name: str, parts: dict[str, Any]) -> StoredArray:
    """One array of the chunks into which Flax cut it."""
    shape, chunks = _in_order(parts.get("shape")), _in_order(parts.get("chunks"))
    if not all(isinstance(n, int) for n in shape) or not all(isinstance(chunk, StoredArray) for chunk in chunks):
        raise InputError(f"{path}: chunked array {name!r} needs a map 'shape' of integers and one 'chunks' of arrays")
    values, dtypes = sum(math.prod(chunk.shape) for chunk in chunks), {chunk.dtype for chunk in chunks}
    if len(dtypes) != 1 or values != math.prod(shape):
        found = f"{values} values of dtypes {sorted(d.name for d in dtypes)}"
        raise InputError(f"{path}: the chunks of {name!r} hold {found}; expected one dtype and shape {list(shape)}")
    return StoredArray(path, shape, dtypes.pop(), tuple(span for chunk in chunks for span in chunk.spans))


def _in_order(numbered: Any) -> tuple[Any, ...]:
    """The values of the map "0", "1" ... that Flax writes for a tuple; (None,) if it is no such map."""
    if not isinstance(numbered, dict):
        return (None,)
    return tuple(numbered.get(str(i)) for i in range(len(numbered)))


class _Walker(Cursor):
    """Reads msgpack values and moves over the contents of arrays."""

    def tree(self) -> dict[str, Any]:
        """The map that is the whole file."""
        kind, length = self.head("the outermost map")
        if kind != "map":
            raise InputError(
                f"{self.path}: not a Flax checkpoint: it starts with msgpack kind {kind!r}, expected 'map'"
            )
        tree = self.map("", length)
        if self.at < self.size:
            raise InputError(f"{self.path}: not a Flax checkpoint: it ends at byte {self.at}, the file at {self.size}")
        return tree

    def value(self, name: str) -> Any:
        """A map as dict, an array as `StoredArray`, or the integer or boolean of a chunked array's description."""
        kind, length = self.head(name)
        match kind:
            case "map":
                return self.map(name, length)
            case "extension":
                return self.array(name, length)
            case "integer" | "boolean":
                return length
        raise InputError(f"{self.path}: {name!r} is of msgpack kind {kind!r}; expected an array or a map of arrays")

    def map(self, name: str, length: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for i in range(length):
            key = self.string(_join(name, f"key {i}"))
            inner = _join(name, key)
            if key in result:
                raise InputError(f"{self.path}: holds {inner!r} twice")
            result[key] = self.value(inner)
        return result

    def array(self, name: str, length: int) -> StoredArray:
        code = self.number(">b", repr(name))
        end = self.at + length
        if code not in (ARRAY, SCALAR):
            found = f"msgpack extension of type {code}; accepted: {ARRAY} (an array) and {SCALAR} (a NumPy scalar)"
            raise InputError(f"{self.path}: {name!r} is a {found}")
        if (parts := self.expect("list", name)) != 3:
            raise InputError(f"{self.path}: array {name!r} has {parts} parts; expected shape, dtype and bytes")
        shape = tuple(self.expect("integer", name) for _ in range(self.expect("list", name)))
        dtype = self.string(name)
        if dtype not in DTYPES:
            raise InputError(f"{self.path}: array {name!r} has dtype {dtype!r}; accepted: {', '.join(DTYPES)}")
        size = self.expect("byte string", name)
        start = self.take(size, repr(name))
        if size != math.prod(shape) * DTYPES[dtype].itemsize or self.at != end:
            found = f"{size} bytes, up to byte {self.at} instead of {end}"
            raise InputError(f"{self.path}: array {name!r} of shape {list(shape)} and dtype {dtype} has {found}")
        return StoredArray(self.path, shape, DTYPES[dtype], ((start, size),))

    def head(self, name: str) -> tuple[str, int]:
        """Kind of the next value, and its length or, of an integer, the value itself."""
        first = self.number(">B", repr(name))
        kind, length = HEADS.get(first, (f"code {first:#04x}", 0))
        return kind, self.number(length, repr(name)) if isinstance(length, str) else length

    def expect(self, expected: str, name: str) -> int:
        kind, length = self.head(name)
        if kind != expected:
            raise InputError(f"{self.path}: in {name!r}: found msgpack kind {kind!r}, expected {expected!r}")
        return length

    def string(self, name: str) -> str:
        return self.text(self.expect("string", name), repr(name))

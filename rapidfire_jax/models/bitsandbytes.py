"""Hugging Face checkpoints whose matrices bitsandbytes stored in 4 bits.

Beside a matrix `NAME`, whose bytes hold two codes each, high half first, lie `NAME.absmax`, the scales of blocks, in
8 bits if they are quantised themselves (`NAME.nested_absmax`, `NAME.nested_quant_map`), the codebook `NAME.quant_map`,
and the settings as JSON, `NAME.quant_state.bitsandbytes__nf4` or `__fp4`.

NF4 with quantised scales in blocks of 64 and 256, what QLoRA uses, is taken as it is, code for code. Everything else
is restored to 16 bits when it is read.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import Quantized
from pallas_kernels.quantized_matmul.formats import BLOCK, CODEBOOKS, DYNAMIC_MAP, GROUP, from_row_major
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.safetensors import DTYPES, Safetensors, open_safetensors

STATE = ".quant_state.bitsandbytes__"
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class BitsAndBytesCheckpoint:
    """The tensors of a folder; matrices in 4 bits come as `Quantized` where they can."""

    def __init__(self, folder: Path):
        self.where = folder
        self._files = open_safetensors(folder, integers=True)
        self._states = {
            name.partition(STATE)[0]: _state(self._files, name) for name in self._files.shapes if STATE in name
        }
        beside = {name for name in self._files.shapes if self._is_beside(name)}
        self.shapes = {name: shape for name, shape in self._files.shapes.items() if name not in beside}
        self.dtypes = {name: self._files.dtypes[name] for name in self.shapes}
        for name, state in self._states.items():
            self.shapes[name], self.dtypes[name] = state["shape"], state["dtype"]
        taken = [name for name in self._states if self._is_ours(name)]
        self.format = "nf4" if taken else None

    def read(self, name: str) -> np.ndarray | Quantized:
        """Tensor `name`."""
        if name not in self._states:
            return self._files.read(name)
        codes: Any = self._codes(name)
        scales: Any = self._read(name, "absmax")
        n, k = self.shapes[name]
        if self._is_ours(name):
            offset = np.float32(self._states[name]["nested_offset"])
            codes, scales = jnp.asarray(codes.reshape(n, k)), jnp.asarray(scales.reshape(n, -1))
            blocks = jnp.asarray(self._read(name, "nested_absmax"))
            return from_row_major(codes, scales, blocks, jnp.asarray(offset), "nf4")
        state = self._states[name]
        if state["nested"]:
            block = np.repeat(self._read(name, "nested_absmax"), state["nested_blocksize"])[: len(scales)]
            scales = self._read(name, "nested_quant_map")[scales] * block + np.float32(state["nested_offset"])
        values = self._read(name, "quant_map")[codes]
        values *= np.repeat(scales, state["blocksize"])[: len(values)]
        return values.reshape(n, k)

    def _is_beside(self, name: str) -> bool:
        """Whether a tensor tells of a matrix: `MATRIX.absmax`, `MATRIX.quant_state.bitsandbytes__nf4`."""
        return any(name.rsplit(".", parts)[0] in self._states for parts in (1, 2))

    def _is_ours(self, name: str) -> bool:
        state = self._states[name]
        return (
            state["quant_type"] == "nf4"
            and state["nested"]
            and (state["blocksize"], state["nested_blocksize"]) == (GROUP, BLOCK)
            and state["shape"][1] % GROUP == 0
            and np.array_equal(self._read(name, "quant_map"), CODEBOOKS["nf4"])
            and np.array_equal(self._read(name, "nested_quant_map"), DYNAMIC_MAP)
        )

    def _codes(self, name: str) -> np.ndarray:
        """Codes one a byte, in row-major order of the matrix."""
        both = self._files.read(name).view(np.uint8).reshape(-1)
        return np.stack([both >> 4, both & 15], axis=-1).reshape(-1)[: math.prod(self.shapes[name])]

    def _read(self, name: str, part: str) -> np.ndarray:
        return self._files.read(f"{name}.{part}").reshape(-1)


def _state(files: Safetensors, name: str) -> dict[str, Any]:
    """The settings of a matrix, with which parts it has checked."""
    matrix, _, kind = name.partition(STATE)
    try:
        said = json.loads(files.read(name).tobytes())
        state = {
            "quant_type": kind,
            "shape": tuple(map(int, said["shape"])),
            "dtype": DTYPES[TYPES[said["dtype"]]],
            "blocksize": int(said["blocksize"]),
            "nested": f"{matrix}.nested_absmax" in files.shapes,
        }
        if state["nested"]:
            state |= {"nested_blocksize": int(said["nested_blocksize"]), "nested_offset": float(said["nested_offset"])}
        if len(state["shape"]) != 2 or min(state["shape"]) < 1 or state["blocksize"] < 1:
            raise ValueError("no matrix, or no blocks")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{files.where}: {name} is damaged: {error!r}") from None
    n, k = state["shape"]
    blocks = -(-n * k // state["blocksize"])
    wanted = {"": -(-n * k // 2), ".absmax": blocks, ".quant_map": 16}
    if state["nested"]:
        wanted |= {".nested_absmax": -(-blocks // state["nested_blocksize"]), ".nested_quant_map": 256}
    for part, count in wanted.items():
        tensor = matrix + part
        held = math.prod(files.shapes[tensor]) if tensor in files.shapes else None
        if not part and held is not None:
            held *= files.dtypes[tensor].itemsize
        if held != count:
            raise InputError(f"{files.where}: {tensor} holds {held} {'numbers' if part else 'bytes'}; expected {count}")
    return state

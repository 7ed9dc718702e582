"""Blocks of GGUF tensors -> float32.

Every quantised type stores small integers and, for groups of them, a scale and perhaps an offset; a value is
`scale * integer + offset`. The types differ in the packing; ggml-common.h and ggml-quants.c of ggml define it.
"""

import numpy as np


def _block(**fields: str) -> np.dtype:
    return np.dtype(list(fields.items()))


# Values in a block, and the block as it lies in the file.
BLOCKS: dict[str, tuple[int, np.dtype]] = {
    "F32": (1, np.dtype("<f4")),
    "F16": (1, np.dtype("<f2")),
    "BF16": (1, np.dtype("<u2")),
    "Q8_0": (32, _block(scale="<f2", whole="32i1")),
    "Q4_0": (32, _block(scale="<f2", low="16u1")),
    "Q4_1": (32, _block(scale="<f2", least="<f2", low="16u1")),
    "Q5_0": (32, _block(scale="<f2", high="4u1", low="16u1")),
    "Q5_1": (32, _block(scale="<f2", least="<f2", high="4u1", low="16u1")),
    "Q2_K": (256, _block(groups="16u1", low="64u1", scale="<f2", least="<f2")),
    "Q3_K": (256, _block(high="32u1", low="64u1", groups="12u1", scale="<f2")),
    "Q4_K": (256, _block(scale="<f2", least="<f2", groups="12u1", low="128u1")),
    "Q5_K": (256, _block(scale="<f2", least="<f2", groups="12u1", high="32u1", low="128u1")),
    "Q6_K": (256, _block(low="128u1", high="64u1", groups="16i1", scale="<f2")),
}
SLICE = 2**19  # values decoded at a time: intermediate results stay small, and in the processor's cache


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """Blocks, in the dtype of `BLOCKS[kind]` -> float32 [blocks, values]; shares memory with `raw` if that is float32.

    Infinite and NaN scales give infinite and NaN values without a warning.
    """
    values = BLOCKS[kind][0]
    if kind == "F32":
        return raw[:, None]
    result = np.empty((len(raw), values), np.float32)
    step = SLICE // values
    with np.errstate(invalid="ignore"):
        for start in range(0, len(raw), step):
            _decode_slice(raw[start : start + step], kind, result[start : start + step])
    return result


def _decode_slice(raw: np.ndarray, kind: str, out: np.ndarray) -> None:
    if kind == "F16":
        out[:, 0] = raw
    elif kind == "BF16":
        np.left_shift(raw, 16, out=out[:, 0].view(np.uint32), dtype=np.uint32)
    else:
        integers, scales, offsets = _parts(raw, kind)
        out[...] = integers
        groups = out.reshape(*scales.shape, -1)
        groups *= scales[..., None]
        if offsets is not None:
            groups += offsets[..., None]


def _parts(raw: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The integers [blocks, values], and the scales and offsets [blocks, groups]."""
    scale = _column(raw["scale"])
    match kind:
        case "Q8_0":
            return raw["whole"], scale, None
        case "Q4_0":
            return _signed(_fields(raw["low"], 4, 16), 8), scale, None
        case "Q4_1":
            return _fields(raw["low"], 4, 16), scale, _column(raw["least"])
        case "Q5_0":
            return _signed(_five_bits(raw), 16), scale, None
        case "Q5_1":
            return _five_bits(raw), scale, _column(raw["least"])
        case "Q2_K":
            groups = _fields(raw["groups"], 4, 16)
            return _fields(raw["low"], 2, 32), scale * groups[:, :16], -_column(raw["least"]) * groups[:, 16:]
        case "Q3_K":
            integers = _fields(raw["low"], 2, 32) | _fields(raw["high"], 1, 32) << 2
            groups = _fields(raw["groups"][:, :8], 4, 8) | _fields(raw["groups"][:, 8:], 2, 4) << 4
            return _signed(integers, 4), scale * _signed(groups, 32), None
        case "Q4_K" | "Q5_K":
            integers = _fields(raw["low"], 4, 32)
            if kind == "Q5_K":
                integers |= _fields(raw["high"], 1, 32) << 4
            scales, offsets = _six_bits(raw["groups"])
            return integers, scale * scales, -_column(raw["least"]) * offsets
        case "Q6_K":
            integers = _fields(raw["low"], 4, 64) | _fields(raw["high"], 2, 32) << 4
            return _signed(integers, 32), scale * raw["groups"], None
    raise ValueError(f"type {kind} has no blocks")


def _column(halves: np.ndarray) -> np.ndarray:
    return halves.astype(np.float32)[:, None]


def _fields(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Fields of `bits` bits, one a byte: of every `run` bytes first all the lowest fields, then all the next higher."""
    runs = packed.reshape(len(packed), -1, run)
    fields = np.stack([runs >> shift for shift in range(0, 8, bits)], axis=2)
    fields &= 2**bits - 1
    return fields.reshape(len(packed), -1)


def _signed(integers: np.ndarray, zero: int) -> np.ndarray:
    """`integers - zero`, all of which are stored as unsigned."""
    return integers.view(np.int8) - np.int8(zero)


def _five_bits(raw: np.ndarray) -> np.ndarray:
    """The integers of Q5_0 and Q5_1."""
    return _fields(raw["low"], 4, 16) | np.unpackbits(raw["high"], axis=1, bitorder="little") << 4


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 offsets of Q4_K and Q5_K.

    Bytes 0 to 7 hold the first 4 of both and, in their two highest bits, those of the last 4; the rest is in 8 to 11.
    """
    ends, rest = packed[:, :8], _fields(packed[:, 8:], 4, 4)
    both = np.stack([ends & 63, rest | ends >> 2 & 48], axis=1).reshape(-1, 2, 2, 4)
    return both[:, :, 0].reshape(-1, 8), both[:, :, 1].reshape(-1, 8)

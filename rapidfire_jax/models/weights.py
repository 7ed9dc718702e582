"""Checkpoints -> `CausalLM`: safetensors in Hugging Face layout, and GGUF.

Stored matrices are `[out, in]`, one a layer; ours are `[in, out]`, stacked over layers. A parameter is filled tensor by
tensor in its final dtype, so that the host never holds more than that parameter and one stored tensor.
"""

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

import jax
import numpy as np
import safetensors
from flax import nnx
from jax.typing import DTypeLike

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.decoder import CausalLM
from rapidfire_jax.models.gguf import GGUFFile
from rapidfire_jax.models.sources import read_json

# Our parameter -> the stored tensor; {} is the layer.
HUGGING_FACE = {
    "embedding": "model.embed_tokens.weight",
    "blocks.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "blocks.q_proj.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.k_proj.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.v_proj.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.o_proj.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.gate_proj.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.up_proj.kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks.down_proj.kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm.scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
GGUF = {
    "embedding": "token_embd.weight",
    "blocks.attention_norm.scale": "blk.{}.attn_norm.weight",
    "blocks.q_proj.kernel": "blk.{}.attn_q.weight",
    "blocks.k_proj.kernel": "blk.{}.attn_k.weight",
    "blocks.v_proj.kernel": "blk.{}.attn_v.weight",
    "blocks.o_proj.kernel": "blk.{}.attn_output.weight",
    "blocks.mlp_norm.scale": "blk.{}.ffn_norm.weight",
    "blocks.gate_proj.kernel": "blk.{}.ffn_gate.weight",
    "blocks.up_proj.kernel": "blk.{}.ffn_up.weight",
    "blocks.down_proj.kernel": "blk.{}.ffn_down.weight",
    "norm.scale": "output_norm.weight",
    "lm_head": "output.weight",
}
FLOATS = ("F64", "F32", "F16", "BF16")


class Slot(NamedTuple):
    """Where a stored tensor belongs: a parameter, and a row of it if it is stacked over layers."""

    path: str
    layer: int | None

    @property
    def transposed(self) -> bool:
        """Whether the axes of the stored tensor are swapped."""
        return self.path.endswith(".kernel")


def slots(config: DecoderConfig, names: Mapping[str, str]) -> dict[str, Slot]:
    """Name of every stored tensor of such a model -> its slot, parameter by parameter."""
    return {
        pattern.format(layer): Slot(path, layer)
        for path, pattern in names.items()
        if not (path == "lm_head" and config.tie_embeddings)
        for layer in (range(config.num_layers) if path.startswith("blocks.") else (None,))
    }


def parameters(model: CausalLM) -> dict[str, jax.Array]:
    """Dotted path -> array of everything in `model`, adapters and value head included."""
    return {_dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assemble(config: DecoderConfig, arrays: Mapping[str, jax.Array]) -> CausalLM:
    """A model from arrays by dotted path; others than a plain `CausalLM` has are left out."""
    graphdef, leaves = _structure(config)
    filled = [(path, leaf.replace(arrays[_dotted(path)])) for path, leaf in leaves]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@functools.cache
def _structure(config: DecoderConfig) -> tuple[nnx.GraphDef, list[tuple[tuple, nnx.Variable]]]:
    """Graph definition of a plain model, and its parameters with shapes in place of arrays."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0))))
    return graphdef, list(nnx.to_flat_state(state))


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def load_safetensors(folder: Path, config: DecoderConfig, dtype: DTypeLike) -> CausalLM:
    """Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
      InputError: no such file, a file cut short, or tensors that do not fit `config` (all of them in one message).
    """
    expected = slots(config, HUGGING_FACE)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in _shards(folder)]
        holder = {name: file for file in files for name in list(file.keys()) if not _ignored(name, config)}
        views = {name: file.get_slice(name) for name, file in holder.items()}
        odd = [f"{name}: dtype {v.get_dtype()}" for name, v in views.items() if v.get_dtype() not in FLOATS]
        if odd:
            raise InputError(f"{folder}: cannot read {'; '.join(odd)}; accepted: {', '.join(FLOATS)}")
        shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
        return _fill(str(folder), config, dtype, expected, shapes, lambda name: holder[name].get_tensor(name))


def load_gguf(file: GGUFFile, config: DecoderConfig, dtype: DTypeLike) -> CausalLM:
    """Reads the tensors of a GGUF file.

    Raises:
      InputError: tensors that do not fit `config`, all of them in one message.
    """
    expected = slots(config, GGUF)
    heads = {"blocks.q_proj.kernel": config.num_heads, "blocks.k_proj.kernel": config.num_kv_heads}

    def read(name: str) -> np.ndarray:
        value, path = file.dequantize(name), expected[name].path
        if path not in heads:
            return value
        # GGUF rotates neighbouring rows against one another, Hugging Face the halves of a head.
        return value.reshape(heads[path], -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)

    shapes = {name: info.shape for name, info in file.tensors.items()}
    return _fill(str(file.path), config, dtype, expected, shapes, read)


def _fill(
    where: str,
    config: DecoderConfig,
    dtype: DTypeLike,
    expected: Mapping[str, Slot],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> CausalLM:
    """Checks the stored `shapes` against the model's, then reads tensor by tensor."""
    ours = {_dotted(path): leaf.get_value().shape for path, leaf in _structure(config)[1]}

    def stored_shape(slot: Slot) -> tuple[int, ...]:
        shape = ours[slot.path] if slot.layer is None else ours[slot.path][1:]
        return shape[::-1] if slot.transposed else shape

    problems = [f"missing: {name}" for name in expected if name not in shapes]
    problems += [f"unexpected: {name}" for name in shapes if name not in expected]
    problems += [
        f"shape of {name}: found {list(shapes[name])}, expected {list(stored_shape(slot))}"
        for name, slot in expected.items()
        if name in shapes and shapes[name] != stored_shape(slot)
    ]
    if problems:
        raise InputError("\n  ".join([f"{where}: the weights do not fit the configuration:", *problems]))

    arrays = {}
    for path, group in itertools.groupby(expected.items(), lambda item: item[1].path):
        array = _aligned(ours[path], dtype)
        for name, slot in group:
            value = read(name)
            if not np.isfinite(value).all():
                warnings.warn(f"{where}: tensor {name!r} holds NaN or infinite values", stacklevel=2)
            array[... if slot.layer is None else slot.layer] = value.T if slot.transposed else value
        arrays[path] = jax.device_put(array)
    return assemble(config, arrays)


def _aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An empty array on a 64-byte boundary: XLA on CPU then takes the memory as it is, without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _ignored(name: str, config: DecoderConfig) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == HUGGING_FACE["lm_head"])


def _open(path: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None


def _shards(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise InputError(_no_safetensors(folder))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: key 'weight_map' is missing; expected tensor name -> file")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise InputError(f"{index}: names {name!r}, which is outside the folder")
        if not (folder / name).exists():
            raise InputError(f"{index}: names {name!r}, which is not in the folder")
    return [folder / name for name in names]


def _no_safetensors(folder: Path) -> str:
    message = f"{folder}: holds no model.safetensors and no model.safetensors.index.json"
    other = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if not other:
        return message
    return (
        f"{message}; {', '.join(other)} cannot be read safely. Convert where PyTorch is installed: python -c "
        f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('NEW')\""
    )

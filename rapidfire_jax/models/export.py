"""Writes models and adapters so that transformers, peft and everything that reads their files can load them."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from safetensors.numpy import save_file

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import to_hugging_face
from rapidfire_jax.models.decoder import CausalLM
from rapidfire_jax.models.lora import merge_lora, projections
from rapidfire_jax.models.weights import HUGGING_FACE, Slot, parameters, slots

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

METADATA = {"format": "pt"}  # transformers wants to be told, whatever the arrays came from


def save_pretrained(
    model: CausalLM,
    folder: str | Path,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face folder: configuration, weights with adapters merged, tokenizer, and the value head beside.

    Args:
      model: with or without adapters and value head; written in its dtype.
      folder: new, empty, or an earlier export, which is replaced.
      tokenizer: written with its chat template; its special tokens go into the configuration.
      max_shard_bytes: larger weights are split over files, with an index.

    Raises:
      InputError: `folder` holds something else.
    """
    merged = parameters(merge_lora(model))
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with _replacing(Path(folder)) as new:
        config = to_hugging_face(model.config, dtype=merged["embedding"].dtype.name)
        _write_json(new / "config.json", config | special)
        _write_json(new / "generation_config.json", special)
        _save_shards(merged, slots(model.config, HUGGING_FACE), new, max_shard_bytes)
        if model.has_value_head:
            head = {
                "v_head.summary.weight": np.asarray(model.value_kernel[...])[None],
                "v_head.summary.bias": np.asarray(model.value_bias[...])[None],
            }
            save_file(head, new / "value_head.safetensors", METADATA)
        tokenizer.save_pretrained(new)


def save_adapter(
    model: CausalLM,
    folder: str | Path,
    *,
    base_model_name: str,
    rank: int,
    alpha: float,
    targets: str | tuple[str, ...],
) -> None:
    """Writes the adapters of `model` in the layout of `peft`, next to nothing of the base model.

    Args:
      model: with adapters.
      folder: new, empty, or an earlier export, which is replaced.
      base_model_name: what `peft` should load the adapters onto.
      rank, alpha, targets: what `add_lora` was called with.

    Raises:
      InputError: `folder` holds something else, or `targets` are unknown.
    """
    names = projections(targets)
    tensors = {}
    adapted = len(model.stacks[-1].q_proj.kernel[...])
    layers = range(model.config.num_layers - adapted, model.config.num_layers)
    for name in names:
        linear = getattr(model.stacks[-1], name)
        module = HUGGING_FACE[f"blocks.{name}.kernel"].removesuffix(".weight")
        for letter, stacked in (("A", linear.lora_a), ("B", linear.lora_b)):
            for layer, matrix in zip(layers, np.asarray(stacked[...]), strict=True):
                tensors[f"base_model.model.{module.format(layer)}.lora_{letter}.weight"] = np.ascontiguousarray(
                    matrix.T
                )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(names),
        "layers_to_transform": list(layers) if model.is_split else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with _replacing(Path(folder)) as new:
        _write_json(new / "adapter_config.json", config)
        save_file(tensors, new / "adapter_model.safetensors", METADATA)


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end, so that what stands there is always whole."""
    earlier = folder.is_dir() and any((folder / mark).exists() for mark in ("config.json", "adapter_config.json"))
    if folder.exists() and not earlier and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: holds other files; name a folder that is new, empty or an earlier export")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        new.rename(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _save_shards(arrays: dict[str, jax.Array], names: dict[str, Slot], folder: Path, max_bytes: int) -> None:
    """Writes the stored tensors `names` of `arrays`, holding one file's worth at a time."""
    sizes = {
        name: arrays[slot.path].nbytes // (1 if slot.layer is None else len(arrays[slot.path]))
        for name, slot in names.items()
    }
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    for file, shard in zip(files, shards, strict=True):
        save_file({name: _stored(arrays, names[name]) for name in shard}, folder / file, METADATA)


def _stored(arrays: dict[str, jax.Array], slot: Slot) -> np.ndarray:
    leaf = arrays[slot.path]
    array = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
    return np.ascontiguousarray(array.T if slot.transposed else array)

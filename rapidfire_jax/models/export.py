"""Writes models so that transformers, vLLM and everything that reads their files can load them."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from rapidfire_jax.models.auto import VALUE_HEAD, load_model
from rapidfire_jax.models.decoder import Decoder
from rapidfire_jax.models.families import FAMILIES, Family, to_hugging_face
from rapidfire_jax.models.folders import replacing
from rapidfire_jax.models.heads import CausalLM, RewardModel
from rapidfire_jax.models.lora import merged_parameter
from rapidfire_jax.models.tokenizer import check_vocabulary, load_tokenizer, stop_ids
from rapidfire_jax.models.weights import Stored, parameters, stored_shapes, stored_tensors, to_stored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

METADATA = {"format": "pt"}  # transformers wants to be told, whatever the arrays came from


def save_pretrained(
    model: Decoder,
    folder: str | Path,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    *,
    eos_ids: tuple[int, ...] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face folder: configuration, weights with adapters merged, tokenizer, and the value head beside.

    Args:
      model: a language model or a reward model, with or without adapters and value head; written in the dtype of its
        weights, quantised matrices too.
      folder: new, empty, or an earlier export, which is replaced.
      tokenizer: written with its chat template; its special tokens go into the configuration.
      eos_ids: tokens that end a response, if there are others than the tokenizer's.
      max_shard_bytes: larger weights are split over files, with an index.

    Raises:
      InputError: `folder` holds something else.
    """
    arrays = parameters(model)
    family = FAMILIES[model.config.family]
    is_reward = isinstance(model, RewardModel)
    # Null where there is no tokenizer: transformers would put a default of the family's own in place of an absent key.
    special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad")}
    generation = special | ({"eos_token_id": list(eos_ids)} if len(eos_ids) > 1 else {})
    with replacing(Path(folder)) as new:
        config = to_hugging_face(model.config, dtype=model.weight_dtype.name, scalar_head=is_reward)
        _write_json(new / "config.json", config | special)
        if not is_reward:
            _write_json(new / "generation_config.json", generation)
        stored = stored_tensors(family, arrays, model.config.num_layers)
        _save_shards(model, stored, family, new, max_shard_bytes)
        if isinstance(model, CausalLM) and model.has_value_head:
            head = {
                "v_head.summary.weight": np.asarray(model.value_kernel[...])[None],
                "v_head.summary.bias": np.asarray(model.value_bias[...])[None],
            }
            save_file(head, new / VALUE_HEAD, METADATA)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def convert(
    source: str, folder: Path, *, adapter: str | None = None, dtype: str = "auto", max_shard_bytes: int
) -> None:
    """Loads a language model or a sequence classifier, whatever holds it, and writes it with its tokenizer.

    Args:
      source: as for `FlaxAutoModelForCausalLM`.
      folder: see `save_pretrained`.
      adapter: `peft` folder or repository to merge into the weights.
      dtype: to write, "auto" being that of the source.
      max_shard_bytes: see `save_pretrained`.
    """
    model = load_model(source, adapter=adapter, dtype=dtype)
    tokenizer = load_tokenizer(source)
    check_vocabulary(source, model.config.vocab_size, tokenizer)
    eos_ids = stop_ids(source, tokenizer)
    save_pretrained(model, folder, tokenizer, eos_ids=eos_ids, max_shard_bytes=max_shard_bytes)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _save_shards(model: Decoder, stored: dict[str, Stored], family: Family, folder: Path, max_bytes: int) -> None:
    """Writes the stored tensors, holding one file's worth at a time."""
    shapes = stored_shapes(type(model), family, model.config)
    itemsize = model.weight_dtype.itemsize
    sizes = {name: math.prod(shapes[name]) * itemsize for name in stored}
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
        tensors = {name: _tensor(model, stored[name], family) for name in shard}
        save_file(tensors, folder / file, METADATA)


def _tensor(model: Decoder, stored: Stored, family: Family) -> np.ndarray:
    parts = [np.asarray(merged_parameter(model, path, stored.layer)) for path in stored.paths]
    return np.ascontiguousarray(to_stored(family, stored.paths[0], parts, model.config.num_heads))

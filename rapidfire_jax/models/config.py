"""Sizes and constants of a decoder, read from a Hugging Face `config.json` or from GGUF metadata."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rapidfire_jax.errors import InputError

FAMILIES = ("llama",)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What fixes the shapes and the arithmetic of a decoder. Static under jit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and not value > 0:
                raise InputError(f"model configuration: {field.name} must be positive, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model configuration: {self.num_heads} query heads are not a multiple of {self.num_kv_heads} kv heads"
            )


def from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Reads a `config.json`, in the 4.x spelling (`rope_theta`) or the 5.x one (`rope_parameters`)."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{where}: model_type {family!r} is not supported; known: {', '.join(FAMILIES)}")
    _refuse(config, where, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise InputError(f"{where}: rope type {rope_type!r} is not supported; known: default")
    try:
        heads = int(config["num_attention_heads"])
        return DecoderConfig(
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            max_positions=int(config.get("max_position_embeddings", 2048)),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise InputError(f"{where}: key {error.args[0]!r} is missing") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from None


def to_hugging_face(config: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    """The `config.json` of a Llama checkpoint, readable by transformers 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


def from_gguf(metadata: Mapping[str, Any], *, tied: bool, where: str) -> DecoderConfig:
    """Reads GGUF metadata. `tied`: the file holds no `output.weight`."""
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise InputError(f"{where}: GGUF architecture {family!r} is not supported; known: {', '.join(FAMILIES)}")
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise InputError(f"{where}: rope scaling {metadata['llama.rope.scaling.type']!r} is not supported; known: none")
    if metadata.get("llama.expert_count", 0):
        raise InputError(f"{where}: mixtures of experts are not supported")
    try:
        heads = int(metadata["llama.attention.head_count"])
        width = int(metadata["llama.embedding_length"])
        return DecoderConfig(
            vocab_size=int(metadata.get("llama.vocab_size") or len(metadata["tokenizer.ggml.tokens"])),
            hidden_size=width,
            intermediate_size=int(metadata["llama.feed_forward_length"]),
            num_layers=int(metadata["llama.block_count"]),
            num_heads=heads,
            num_kv_heads=int(metadata.get("llama.attention.head_count_kv", heads)),
            head_dim=int(metadata.get("llama.attention.key_length", width // heads)),
            max_positions=int(metadata["llama.context_length"]),
            rope_theta=float(metadata.get("llama.rope.freq_base", 10000.0)),
            norm_eps=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
            tie_embeddings=tied,
        )
    except KeyError as error:
        raise InputError(f"{where}: metadata key {error.args[0]!r} is missing") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from None


def _refuse(config: Mapping[str, Any], where: str, **accepted: tuple[Any, ...]) -> None:
    for key, values in accepted.items():
        if config.get(key, values[0]) not in values:
            raise InputError(f"{where}: {key}={config[key]!r} is not supported; accepted: {list(values)}")

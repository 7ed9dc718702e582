"""Configurations of models: of a folder or file that is here, or of well-known repositories, without asking the hub."""

from typing import Any

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.auto import open_checkpoint
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.families import from_hugging_face
from rapidfire_jax.models.sources import read_json, resolve

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_LONG = {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": 128,
}
_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "head_dim": 128,
}
_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
_MISTRAL: dict[str, Any] = _8B | {
    "model_type": "mistral",
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_MISTRAL_3 = _MISTRAL | {
    "vocab_size": 32768,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
_LONGER = _LONG | {"rope_parameters": _LONG["rope_parameters"] | {"factor": 32.0}}  # type: ignore[operator]
KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA | _8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA | _8B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA | _70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": _LLAMA | _70B,
    "meta-llama/Llama-3.1-8B": _LLAMA | _8B | _LONG,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA | _8B | _LONG,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA | _70B | _LONG,
    "meta-llama/Llama-3.2-1B": _LLAMA | _1B | _LONGER,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA | _1B | _LONGER,
    "meta-llama/Llama-3.2-3B": _LLAMA | _3B | _LONGER,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA | _3B | _LONGER,
    "Ray2333/GRM-llama3-8B-distill": _LLAMA | _8B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "weqweasdas/RM-Mistral-7B": _MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_3,
    "mistralai/Mistral-7B-v0.3": _MISTRAL_3,
}


def architecture(name: str) -> DecoderConfig:
    """The configuration of a model, as a run's configuration names it.

    Raises:
      InputError: no model there, and none that is known by this name.
    """
    if name.partition("@")[0] in KNOWN:
        return from_hugging_face(KNOWN[name.partition("@")[0]], where=name)
    try:
        path = resolve(name)
    except InputError as error:
        raise InputError(f"{error}; known without files: {', '.join(KNOWN)}") from None
    if path.is_dir() and (path / "config.json").is_file():
        return from_hugging_face(read_json(path / "config.json"), where=str(path))
    return open_checkpoint(path)[2]

"""GGUF files of every family: metadata -> the keys of a `config.json`, and the layout of the tensors.

The conversions are those of llama.cpp: rows of the queries and keys of Llama are permuted, norm scales of Gemma are
stored with their offset added, fused projections are laid out one part after another, and rope scaling of Llama 3 and
Phi-3 is a tensor.
"""

import dataclasses
from typing import Any

import numpy as np

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.families import FAMILIES, Family, from_hugging_face
from rapidfire_jax.models.families.base import write_rope
from rapidfire_jax.models.gguf import GGUFFile
from rapidfire_jax.models.gguf_blocks import BLOCKS
from rapidfire_jax.models.rope import Rope, llama3_factors

NAMES = {
    "embedding": "token_embd.weight",
    "position_embedding": "position_embd.weight",
    "blocks.attention_norm.scale": "blk.{}.attn_norm.weight",
    "blocks.attention_norm.bias": "blk.{}.attn_norm.bias",
    "blocks.q_proj.kernel": "blk.{}.attn_q.weight",
    "blocks.q_proj.bias": "blk.{}.attn_q.bias",
    "blocks.k_proj.kernel": "blk.{}.attn_k.weight",
    "blocks.k_proj.bias": "blk.{}.attn_k.bias",
    "blocks.v_proj.kernel": "blk.{}.attn_v.weight",
    "blocks.v_proj.bias": "blk.{}.attn_v.bias",
    "blocks.q_norm.scale": "blk.{}.attn_q_norm.weight",
    "blocks.k_norm.scale": "blk.{}.attn_k_norm.weight",
    "blocks.o_proj.kernel": "blk.{}.attn_output.weight",
    "blocks.o_proj.bias": "blk.{}.attn_output.bias",
    "blocks.attention_post_norm.scale": "blk.{}.post_attention_norm.weight",
    "blocks.mlp_norm.scale": "blk.{}.ffn_norm.weight",
    "blocks.mlp_norm.bias": "blk.{}.ffn_norm.bias",
    "blocks.gate_proj.kernel": "blk.{}.ffn_gate.weight",
    "blocks.gate_proj.bias": "blk.{}.ffn_gate.bias",
    "blocks.up_proj.kernel": "blk.{}.ffn_up.weight",
    "blocks.up_proj.bias": "blk.{}.ffn_up.bias",
    "blocks.down_proj.kernel": "blk.{}.ffn_down.weight",
    "blocks.down_proj.bias": "blk.{}.ffn_down.bias",
    "blocks.mlp_post_norm.scale": "blk.{}.post_ffw_norm.weight",
    "norm.scale": "output_norm.weight",
    "norm.bias": "output_norm.bias",
    "lm_head": "output.weight",
    "score": "cls.output.weight",
}
FUSED_QKV = {
    f"blocks.{part}_proj.{leaf}": f"blk.{{}}.attn_qkv.{stored}"
    for leaf, stored in (("kernel", "weight"), ("bias", "bias"))
    for part in "qkv"
}
FUSED_GATE_UP = {f"blocks.{part}_proj.kernel": "blk.{}.ffn_up.weight" for part in ("gate", "up")}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
LLAMA3_CONTEXT = 8192  # of pre-training, for every Llama 3
LARGEST_GEMMA = (46, 62)  # layers of Gemma 2 27B and Gemma 3 27B, which scale queries by width per head


class GGUFCheckpoint:
    """The tensors of a GGUF file in the layout that `gguf_layout` describes."""

    format: str | None = None  # blocks are restored when they are read

    def __init__(self, file: GGUFFile, config: DecoderConfig):
        self.where = file.path
        self.shapes = {name: info.shape for name, info in file.tensors.items()}
        self.dtypes = {
            name: BLOCKS[info.type][1] if info.type in ("F32", "F16") else np.dtype(np.float32)
            for name, info in file.tensors.items()
        }
        self._file, self._config = file, config

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as float32, with what the conversion did to it undone."""
        value, config = self._file.dequantize(name), self._config
        if config.norm_offset and name.endswith("norm.weight"):
            return value - np.float32(config.norm_offset)
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2], 0)
        if config.family == "llama" and heads:
            # GGUF rotates neighbouring rows against one another, Hugging Face the halves of a head.
            return value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        return value


def gguf_layout(file: GGUFFile, config: DecoderConfig) -> Family:
    """The family with the names and the layout of this file's tensors."""
    names = dict(NAMES)
    if "blk.0.attn_qkv.weight" in file.tensors:
        names |= FUSED_QKV
    if config.gated and "blk.0.ffn_gate.weight" not in file.tensors:
        names |= FUSED_GATE_UP
    return dataclasses.replace(
        FAMILIES[config.family],
        names={path: names[path] for path in sorted(names, key=list(NAMES).index)},
        trunk="",
        interleaved=False,
        transposed=False,
        ignored=ROPE_TENSORS,
    )


def from_gguf(file: GGUFFile) -> DecoderConfig:
    """Reads the metadata of a file.

    Raises:
      InputError: an unsupported architecture, or a value that is missing or not supported.
    """
    architectures = {family.gguf: family for family in FAMILIES.values() if family.gguf}
    name = file.metadata.get("general.architecture")
    if name not in architectures:
        known = ", ".join(architectures)
        raise InputError(f"{file.path}: GGUF architecture {name!r} is not supported; known: {known}")
    return from_hugging_face(_config_json(architectures[name], _Metadata(file, str(name))), where=str(file.path))


class _Metadata:
    """Metadata below the name of the architecture."""

    def __init__(self, file: GGUFFile, prefix: str):
        self.file, self.prefix = file, prefix

    def get(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        # Numbers are stored in float32; the shortest decimal number is the one that was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise InputError(f"{self.file.path}: metadata key '{self.prefix}.{key}' is missing")
        return value


def _config_json(family: Family, meta: _Metadata) -> dict[str, Any]:
    if meta.get("expert_count", 0):
        raise InputError(f"{meta.file.path}: mixtures of experts are not supported")
    tensors = meta.file.tensors
    width, heads, layers = (meta.need(k) for k in ("embedding_length", "attention.head_count", "block_count"))
    if "token_embd.weight" not in tensors or not heads:
        raise InputError(f"{meta.file.path}: tensor 'token_embd.weight' is missing, or the model has no heads")
    head_dim = meta.get("attention.key_length", width // heads)
    values: dict[str, Any] = {
        "model_type": family.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": meta.need("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.need("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(meta, head_dim),
        "attention_bias": "blk.0.attn_output.bias" in tensors,
    }
    match family.model_type:
        case "gpt2" | "gpt_neox":
            epsilon = meta.need("attention.layer_norm_epsilon")
        case _:
            epsilon = meta.need("attention.layer_norm_rms_epsilon")
    values |= {"rms_norm_eps": epsilon, "layer_norm_eps": epsilon}
    match family.model_type:
        case "llama":
            values["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
        case "gemma2" | "gemma3_text":
            values |= _gemma(family, meta, values)
        case "gpt_neox":
            values["use_parallel_residual"] = meta.get("use_parallel_residual", True)
        case "gpt2":
            renamed = {"n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers"}
            renamed |= {"n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}
            values |= {new: values[old] for new, old in renamed.items()} | {"layer_norm_epsilon": epsilon}
        case "phi3":
            values["sliding_window"] = meta.get("attention.sliding_window") or None
    return values


def _rope(meta: _Metadata, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": meta.get("rope.freq_base", 10000.0),
        "partial_rotary_factor": meta.get("rope.dimension_count", head_dim) / head_dim,
    }
    tensors = meta.file.tensors
    if "rope_freqs.weight" in tensors:
        return rope | _frequency_factors(meta, rope["rope_theta"], head_dim)
    kind = meta.get("rope.scaling.type", "none")
    original = meta.get("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in tensors:
        factors = {f"{s}_factor": meta.file.dequantize(f"rope_factors_{s}.weight").tolist() for s in ("long", "short")}
        attention = meta.get("rope.scaling.attn_factor", 1.0)
        kind, rope = "longrope", rope | factors | {"attention_factor": attention}
    elif kind == "none":
        return rope
    elif kind not in ("linear", "yarn"):
        raise InputError(f"{meta.file.path}: rope scaling {kind!r} is not supported; known: none, linear, yarn")
    else:
        rope["factor"] = meta.need("rope.scaling.factor")
    if original is not None:
        rope["original_max_position_embeddings"] = original
    for ours, stored in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if kind == "yarn" and (value := meta.get(f"rope.scaling.{stored}")) is not None:
            rope[ours] = value
    return rope | {"rope_type": kind}


def _frequency_factors(meta: _Metadata, theta: float, head_dim: int) -> dict[str, Any]:
    """What divides the frequencies: the scaling of Llama 3 if it is that, otherwise the factors themselves."""
    stored = meta.file.dequantize("rope_freqs.weight")
    factor = float(stored.max())
    usual = Rope(type="llama3", theta=theta, factor=factor, original_positions=LLAMA3_CONTEXT)
    expected = llama3_factors(usual, head_dim)
    if stored.shape == expected.shape and np.allclose(stored, expected, rtol=1e-3):
        return write_rope(usual)
    factors, context = stored.tolist(), meta.need("context_length")
    rope = {"rope_type": "longrope", "rope_theta": theta, "original_max_position_embeddings": context}
    return rope | {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}


def _gemma(family: Family, meta: _Metadata, values: dict[str, Any]) -> dict[str, Any]:
    layers, width, heads = (values[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    extra: dict[str, Any] = {
        "query_pre_attn_scalar": width / heads if layers in LARGEST_GEMMA else values["head_dim"],
        "sliding_window": meta.get("attention.sliding_window", 4096),
        "final_logit_softcapping": meta.get("final_logit_softcapping"),
        "attn_logit_softcapping": meta.get("attn_logit_softcapping"),
    }
    if family.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": meta.get("rope.freq_base_swa", 10000.0)}
        extra["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": local}
        extra["sliding_window_pattern"] = meta.get("attention.sliding_window_pattern", 6)
    return extra

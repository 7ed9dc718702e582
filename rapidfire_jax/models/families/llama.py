"""Llama, Mistral, Qwen 2 and Qwen 3: RMSNorm, rotary positions, gated MLP."""

from typing import Any

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.families.base import Family, Keys, read_rope, sizes, write_both_ropes, write_sizes

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "blocks.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "blocks.q_proj.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.q_proj.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks.k_proj.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.k_proj.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks.v_proj.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.v_proj.bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks.q_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.k_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.o_proj.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.o_proj.bias": "model.layers.{}.self_attn.o_proj.bias",
    "blocks.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.gate_proj.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.gate_proj.bias": "model.layers.{}.mlp.gate_proj.bias",
    "blocks.up_proj.kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks.up_proj.bias": "model.layers.{}.mlp.up_proj.bias",
    "blocks.down_proj.kernel": "model.layers.{}.mlp.down_proj.weight",
    "blocks.down_proj.bias": "model.layers.{}.mlp.down_proj.bias",
    "norm.scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "score": "score.weight",
}


def _read_llama(keys: Keys) -> DecoderConfig:
    bias = keys.flag("attention_bias")
    return DecoderConfig(
        **sizes(keys, tied=False),
        family="llama",
        rope=read_rope(keys),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        activation=keys.get("hidden_act", "silu"),
    )


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    assert config.rope is not None
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return write_sizes(config) | write_both_ropes(config.rope) | {"hidden_act": config.activation} | biases


def _read_mistral(keys: Keys) -> DecoderConfig:
    window = keys.integer("sliding_window", 0) if "sliding_window" in keys.values else 4096
    common = sizes(keys, tied=False)
    return DecoderConfig(
        **common,
        family="mistral",
        rope=read_rope(keys),
        sliding_window=window or None,
        local_layers=tuple(range(common["num_layers"])) if window else (),
        activation=keys.get("hidden_act", "silu"),
    )


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    assert config.rope is not None
    extra = {"hidden_act": config.activation, "sliding_window": config.sliding_window}
    return write_sizes(config) | write_both_ropes(config.rope) | extra


def _read_qwen(keys: Keys) -> DecoderConfig:
    third = keys.values["model_type"] == "qwen3"
    common = sizes(keys, tied=False, head_dim=128 if third else None)
    windowed = keys.flag("use_sliding_window")
    local = local_layers(keys, common["num_layers"], first=keys.integer("max_window_layers", 28)) if windowed else ()
    bias = keys.flag("attention_bias") if third else True
    return DecoderConfig(
        **common,
        family=keys.values["model_type"],
        rope=read_rope(keys),
        sliding_window=keys.integer("sliding_window", 4096) if local else None,
        local_layers=local,
        qkv_bias=bias,
        output_bias=bias and third,
        qk_norm=third,
        activation=keys.get("hidden_act", "silu"),
    )


def local_layers(keys: Keys, count: int, *, first: int) -> tuple[int, ...]:
    """Layers with a window: those that `layer_types` names, else all from number `first` on."""
    kinds = keys.get("layer_types")
    if kinds is None:
        return tuple(range(first, count))
    if not isinstance(kinds, list) or len(kinds) != count:
        raise InputError(f"{keys.where}: layer_types={kinds!r}; expected a list of {count} kinds")
    return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def _write_qwen(config: DecoderConfig) -> dict[str, Any]:
    assert config.rope is not None
    values = write_sizes(config) | write_both_ropes(config.rope) | {"hidden_act": config.activation}
    if config.family == "qwen3":
        values["attention_bias"] = config.qkv_bias
    return values | {
        "use_sliding_window": bool(config.local_layers),
        "sliding_window": config.sliding_window,
        "max_window_layers": min(config.local_layers, default=config.num_layers),
        "layer_types": layer_types(config),
    }


def layer_types(config: DecoderConfig) -> list[str]:
    """The kind of each layer, as transformers names it."""
    kinds = ("full_attention", "sliding_attention")
    return [kinds[i in config.local_layers] for i in range(config.num_layers)]


def _architectures(name: str) -> tuple[str, str]:
    return f"{name}ForCausalLM", f"{name}ForSequenceClassification"


FAMILIES = (
    Family("llama", _architectures("Llama"), NAMES, _read_llama, _write_llama, gguf="llama"),
    Family("mistral", _architectures("Mistral"), NAMES, _read_mistral, _write_mistral, gguf="mistral"),
    Family("qwen2", _architectures("Qwen2"), NAMES, _read_qwen, _write_qwen, gguf="qwen2"),
    Family("qwen3", _architectures("Qwen3"), NAMES, _read_qwen, _write_qwen, gguf="qwen3"),
)

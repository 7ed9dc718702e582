"""Gemma 1, 2 and 3 (text): scaled embeddings, norm scales stored less one, soft-caps, local and global layers."""

from typing import Any

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.families.base import Family, Keys, read_rope, rope_of, sizes, write_rope, write_sizes
from rapidfire_jax.models.families.llama import NAMES, layer_types
from rapidfire_jax.models.families.llama import local_layers as listed_layers

NAMES_WITH_POST_NORMS = NAMES | {
    "blocks.attention_post_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.mlp_norm.scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blocks.mlp_post_norm.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def _common(keys: Keys) -> dict[str, Any]:
    keys.refuse(use_bidirectional_attention=(False,))
    bias = keys.flag("attention_bias")
    return sizes(keys, tied=True, head_dim=256) | {
        "family": keys.values["model_type"],
        "qkv_bias": bias,
        "output_bias": bias,
        "norm_offset": 1.0,
        "scale_embedding": True,
    }


def _read_gemma(keys: Keys) -> DecoderConfig:
    # The first configurations say "gelu" and were trained with the tanh form.
    named = keys.get("hidden_activation") or keys.get("hidden_act", "gelu_pytorch_tanh")
    activation = "gelu_pytorch_tanh" if named == "gelu" else named
    return DecoderConfig(**_common(keys), rope=read_rope(keys), activation=activation)


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
    assert config.rope is not None
    activation = {"hidden_act": config.activation, "hidden_activation": config.activation}
    return _write_common(config) | activation | _old_and_new(config)


def _read_gemma2(keys: Keys) -> DecoderConfig:
    return DecoderConfig(
        **_common(keys),
        **_second(keys, period=2),
        rope=read_rope(keys),
        attention_soft_cap=keys.optional_number("attn_logit_softcapping", 50.0),
        logit_soft_cap=keys.optional_number("final_logit_softcapping", 30.0),
    )


def _read_gemma3(keys: Keys) -> DecoderConfig:
    keys.refuse(attn_logit_softcapping=(None,))  # transformers reads it and does not apply it
    nested = keys.mapping("rope_parameters")
    if nested and GLOBAL not in nested:
        raise InputError(f"{keys.where}: rope_parameters has keys {list(nested)}; expected {GLOBAL!r} and {LOCAL!r}")
    far = Keys(nested.get(GLOBAL) or keys.mapping("rope_scaling"), keys.where)
    near = Keys(nested.get(LOCAL) or {}, keys.where)
    context = keys.integer("max_position_embeddings", 131072)
    return DecoderConfig(
        **_common(keys),
        **_second(keys, period=keys.integer("sliding_window_pattern", keys.get("_sliding_window_pattern", 6))),
        rope=rope_of(far, theta=keys.number("rope_theta", 1e6), fraction=1.0, context=context),
        local_rope=rope_of(near, theta=keys.number("rope_local_base_freq", 1e4), fraction=1.0, context=context),
        logit_soft_cap=keys.optional_number("final_logit_softcapping"),
        qk_norm=True,
    )


def _second(keys: Keys, *, period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; by default every `period`-th layer is global."""
    count = keys.integer("num_hidden_layers")
    by_period = tuple(i for i in range(count) if (i + 1) % period)
    local = by_period if keys.get("layer_types") is None else listed_layers(keys, count, first=0)
    return {
        "attention_scale": keys.number("query_pre_attn_scalar", 256) ** -0.5,
        "sliding_window": keys.integer("sliding_window", 4096) if local else None,
        "local_layers": local,
        "post_norms": True,
        "activation": keys.get("hidden_activation", "gelu_pytorch_tanh"),
    }


def _write_common(config: DecoderConfig) -> dict[str, Any]:
    return write_sizes(config) | {"attention_bias": config.qkv_bias}


def _old_and_new(config: DecoderConfig) -> dict[str, Any]:
    assert config.rope is not None
    return {"rope_parameters": write_rope(config.rope), "rope_theta": config.rope.theta}


def _write_second(config: DecoderConfig) -> dict[str, Any]:
    assert config.attention_scale is not None
    scalar = config.attention_scale**-2
    return {
        "hidden_activation": config.activation,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
        "final_logit_softcapping": config.logit_soft_cap,
        "attn_logit_softcapping": config.attention_soft_cap,
    }


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return _write_common(config) | _write_second(config) | _old_and_new(config)


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    assert config.rope is not None and config.local_rope is not None
    ropes = {
        "rope_parameters": {GLOBAL: write_rope(config.rope), LOCAL: write_rope(config.local_rope)},
        "rope_theta": config.rope.theta,
        "rope_local_base_freq": config.local_rope.theta,
    }
    return _write_common(config) | _write_second(config) | ropes


FAMILIES = (
    Family(
        "gemma", ("GemmaForCausalLM", "GemmaForSequenceClassification"), NAMES, _read_gemma, _write_gemma, gguf="gemma"
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
        NAMES_WITH_POST_NORMS,
        _read_gemma2,
        _write_gemma2,
        gguf="gemma2",
    ),
    Family(
        "gemma3_text",
        ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
        NAMES_WITH_POST_NORMS,
        _read_gemma3,
        _write_gemma3,
        gguf="gemma3",
    ),
)

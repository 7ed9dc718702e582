"""GPT-2 (learned positions) and GPT-NeoX/Pythia (parallel residual, partial rotary): LayerNorm, biases, plain MLP."""

from typing import Any

from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.families.base import Family, Keys, read_rope, sizes, write_rope, write_sizes

GPT2_NAMES = {
    "embedding": "transformer.wte.weight",
    "position_embedding": "transformer.wpe.weight",
    "blocks.attention_norm.scale": "transformer.h.{}.ln_1.weight",
    "blocks.attention_norm.bias": "transformer.h.{}.ln_1.bias",
    "blocks.q_proj.kernel": "transformer.h.{}.attn.c_attn.weight",
    "blocks.k_proj.kernel": "transformer.h.{}.attn.c_attn.weight",
    "blocks.v_proj.kernel": "transformer.h.{}.attn.c_attn.weight",
    "blocks.q_proj.bias": "transformer.h.{}.attn.c_attn.bias",
    "blocks.k_proj.bias": "transformer.h.{}.attn.c_attn.bias",
    "blocks.v_proj.bias": "transformer.h.{}.attn.c_attn.bias",
    "blocks.o_proj.kernel": "transformer.h.{}.attn.c_proj.weight",
    "blocks.o_proj.bias": "transformer.h.{}.attn.c_proj.bias",
    "blocks.mlp_norm.scale": "transformer.h.{}.ln_2.weight",
    "blocks.mlp_norm.bias": "transformer.h.{}.ln_2.bias",
    "blocks.up_proj.kernel": "transformer.h.{}.mlp.c_fc.weight",
    "blocks.up_proj.bias": "transformer.h.{}.mlp.c_fc.bias",
    "blocks.down_proj.kernel": "transformer.h.{}.mlp.c_proj.weight",
    "blocks.down_proj.bias": "transformer.h.{}.mlp.c_proj.bias",
    "norm.scale": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "lm_head": "lm_head.weight",
    "score": "score.weight",
}
NEOX_NAMES = {
    "embedding": "gpt_neox.embed_in.weight",
    "blocks.attention_norm.scale": "gpt_neox.layers.{}.input_layernorm.weight",
    "blocks.attention_norm.bias": "gpt_neox.layers.{}.input_layernorm.bias",
    "blocks.q_proj.kernel": "gpt_neox.layers.{}.attention.query_key_value.weight",
    "blocks.k_proj.kernel": "gpt_neox.layers.{}.attention.query_key_value.weight",
    "blocks.v_proj.kernel": "gpt_neox.layers.{}.attention.query_key_value.weight",
    "blocks.q_proj.bias": "gpt_neox.layers.{}.attention.query_key_value.bias",
    "blocks.k_proj.bias": "gpt_neox.layers.{}.attention.query_key_value.bias",
    "blocks.v_proj.bias": "gpt_neox.layers.{}.attention.query_key_value.bias",
    "blocks.o_proj.kernel": "gpt_neox.layers.{}.attention.dense.weight",
    "blocks.o_proj.bias": "gpt_neox.layers.{}.attention.dense.bias",
    "blocks.mlp_norm.scale": "gpt_neox.layers.{}.post_attention_layernorm.weight",
    "blocks.mlp_norm.bias": "gpt_neox.layers.{}.post_attention_layernorm.bias",
    "blocks.up_proj.kernel": "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
    "blocks.up_proj.bias": "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias",
    "blocks.down_proj.kernel": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    "blocks.down_proj.bias": "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias",
    "norm.scale": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "lm_head": "embed_out.weight",
    "score": "score.weight",
}


def _read_gpt2(keys: Keys) -> DecoderConfig:
    keys.refuse(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,))
    width, heads = keys.integer("n_embd"), keys.integer("n_head")
    return DecoderConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=keys.integer("n_inner", 4 * width),
        num_layers=keys.integer("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // max(heads, 1),
        max_positions=keys.integer("n_positions", keys.get("n_ctx", 1024)),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        family="gpt2",
        rope=None,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm="layer",
        gated=False,
        activation=keys.get("activation_function", "gelu_new"),
    )


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "activation_function": config.activation,
    }


def _read_neox(keys: Keys) -> DecoderConfig:
    bias = keys.flag("attention_bias", True)
    common = sizes(keys, tied=False) | {"norm_eps": keys.number("layer_norm_eps", 1e-5)}
    return DecoderConfig(
        **common,
        family="gpt_neox",
        rope=read_rope(keys, theta="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        norm="layer",
        parallel=keys.flag("use_parallel_residual", True),
        gated=False,
        activation=keys.get("hidden_act", "gelu"),
    )


def _write_neox(config: DecoderConfig) -> dict[str, Any]:
    assert config.rope is not None
    others = ("num_key_value_heads", "head_dim", "rms_norm_eps")
    scaling = {k: v for k, v in write_rope(config.rope).items() if k not in ("rope_theta", "partial_rotary_factor")}
    return {key: value for key, value in write_sizes(config).items() if key not in others} | {
        "layer_norm_eps": config.norm_eps,
        "rope_parameters": write_rope(config.rope) | {"partial_rotary_factor": config.rope.fraction},
        "rotary_emb_base": config.rope.theta,
        "rotary_pct": config.rope.fraction,
        "rope_scaling": None if config.rope.type == "default" else scaling,
        "use_parallel_residual": config.parallel,
        "attention_bias": config.qkv_bias,
        "hidden_act": config.activation,
    }


FAMILIES = (
    Family(
        "gpt2",
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        GPT2_NAMES,
        _read_gpt2,
        _write_gpt2,
        trunk="transformer.",
        gguf="gpt2",
        transposed=True,
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    Family(
        "gpt_neox",
        ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
        NEOX_NAMES,
        _read_neox,
        _write_neox,
        trunk="gpt_neox.",
        gguf="gptneox",
        interleaved=True,
        ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    ),
)

"""Phi-3: Llama with fused projections, partial rotary embedding and LongRoPE."""

from typing import Any

from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.families.base import Family, Keys, read_rope, sizes, write_both_ropes, write_sizes
from rapidfire_jax.models.families.llama import NAMES

PHI3_NAMES = NAMES | {
    "blocks.q_proj.kernel": "model.layers.{}.self_attn.qkv_proj.weight",
    "blocks.k_proj.kernel": "model.layers.{}.self_attn.qkv_proj.weight",
    "blocks.v_proj.kernel": "model.layers.{}.self_attn.qkv_proj.weight",
    "blocks.gate_proj.kernel": "model.layers.{}.mlp.gate_up_proj.weight",
    "blocks.up_proj.kernel": "model.layers.{}.mlp.gate_up_proj.weight",
}


def _read(keys: Keys) -> DecoderConfig:
    common = sizes(keys, tied=False)
    common["norm_eps"] = keys.number("rms_norm_eps", 1e-5)
    window = keys.integer("sliding_window", 0)
    scaling = keys.mapping("rope_parameters") or keys.mapping("rope_scaling")
    if scaling.get("rope_type", scaling.get("type")) == "yarn":  # so the first LongRoPE configurations call it
        renamed = dict(scaling) | {"rope_type": "longrope"}
        keys = Keys(dict(keys.values) | {"rope_parameters": renamed}, keys.where)
    return DecoderConfig(
        **common,
        family="phi3",
        rope=read_rope(keys),
        sliding_window=window or None,
        local_layers=tuple(range(common["num_layers"])) if window else (),
        activation=keys.get("hidden_act", "silu"),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    assert config.rope is not None
    values = write_sizes(config) | write_both_ropes(config.rope)
    del values["head_dim"]
    return values | {
        "partial_rotary_factor": config.rope.fraction,
        "original_max_position_embeddings": config.rope.original_positions or config.max_positions,
        "sliding_window": config.sliding_window,
        "hidden_act": config.activation,
    }


FAMILIES = (
    Family("phi3", ("Phi3ForCausalLM", "Phi3ForSequenceClassification"), PHI3_NAMES, _read, _write, gguf="phi3"),
)

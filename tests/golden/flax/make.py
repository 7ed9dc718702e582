"""Writes the folders beside it: tiny random models as the Flax classes of transformers 4 save and compute them.

Runs in an environment of its own (Python 3.11, transformers 4.57.6, flax 0.12.8, jax 0.10.2):

    python tests/golden/flax/make.py

Each folder holds what `save_pretrained` writes and `golden.npz`: `tokens` [2, 12] and the float32 `logits` [2, 12, 64].
"""

import pathlib
import shutil

import flax
import jax
import numpy as np
import transformers

HERE = pathlib.Path(__file__).parent
SIZES = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SIZES | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "rope_theta": 10000.0, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": (transformers.FlaxLlamaForCausalLM, transformers.LlamaConfig(**LLAMA)),
    "mistral": (transformers.FlaxMistralForCausalLM, transformers.MistralConfig(**LLAMA, sliding_window=4096)),
    "gemma": (
        transformers.FlaxGemmaForCausalLM,
        transformers.GemmaConfig(**LLAMA, hidden_activation="gelu_pytorch_tanh"),
    ),
    "gpt2": (
        transformers.FlaxGPT2LMHeadModel,
        transformers.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64),
    ),
}


def main() -> None:
    tokens = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 12)).astype(np.int32)
    for family, (model_class, config) in MODELS.items():
        model = model_class(config, seed=0)
        model.params = larger(model.params)
        save(model, family, tokens)
        if family == "llama":
            save(model, "llama_sharded", tokens, max_shard_size="30KB")
            model.params = model.to_bf16(model.params)
            save(model, "llama_bfloat16", tokens)


def larger(params: dict) -> dict:
    """Matrices five times as large, and random biases and norms: every parameter shows in the logits."""
    rng = np.random.default_rng(0)

    def change(value: jax.Array) -> jax.Array:
        return value * 5 if value.ndim > 1 else value + 0.3 * rng.normal(size=value.shape).astype(np.float32)

    return jax.tree.map(change, params)


def save(model: transformers.FlaxPreTrainedModel, name: str, tokens: np.ndarray, **options: str) -> None:
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name, **options)
    np.savez_compressed(
        HERE / name / "golden.npz",
        tokens=tokens,
        logits=np.asarray(model(tokens).logits, np.float32),
        versions=np.array([f"{m.__name__} {m.__version__}" for m in (transformers, flax, jax)]),
    )


if __name__ == "__main__":
    main()

"""Small GGUF files, written with the `gguf` package."""

from pathlib import Path

import gguf
import numpy as np

from rapidfire_jax.models.heads import CausalLM

BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]  # GPT-2's printable stand-ins for all 256 bytes
SPECIAL = ["<|end|>", "<|start|>"]
WORDS = ["he", "ll", "hell", "hello", "Ġw", "or", "Ġwor", "12", "123"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "1 2", "12 3"]


def write_gguf(path: Path, *, metadata=(), tensors=(), tokenizer: dict | None = None, **llama) -> Path:
    """Writes `metadata` rows (method of GGUFWriter, key, value), `tensors` rows (name, array[, type]), a tokenizer.

    `tokenizer` changes or, with None, removes entries of a small byte-level BPE; `llama` are keys of the architecture.
    """
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in llama.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add("llama." + key.replace("__", "."), value)
    for method, key, value in metadata:
        getattr(writer, method)(key, value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    for name, array, *kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind[0] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, changes: dict) -> None:
    tokens = [*SPECIAL, *BYTES, *WORDS]
    entries = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": MERGES,
        "token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "eos_token_id": 0,
        "bos_token_id": 1,
    } | changes
    for key, value in entries.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{key}", value)
        elif value is not None:
            writer.add_array(f"tokenizer.ggml.{key}", value)


def write_model(path: Path, model: CausalLM, **changes) -> Path:
    """`model` as a float32 GGUF file, the way llama.cpp's converter writes a Hugging Face checkpoint."""
    c = model.config
    names = {
        "attn_norm": (model.blocks.attention_norm.scale, 0), "ffn_norm": (model.blocks.mlp_norm.scale, 0),
        "attn_q": (model.blocks.q_proj.kernel, c.num_heads), "attn_k": (model.blocks.k_proj.kernel, c.num_kv_heads),
        "attn_v": (model.blocks.v_proj.kernel, 0), "attn_output": (model.blocks.o_proj.kernel, 0),
        "ffn_gate": (model.blocks.gate_proj.kernel, 0), "ffn_up": (model.blocks.up_proj.kernel, 0),
        "ffn_down": (model.blocks.down_proj.kernel, 0),
    }  # fmt: skip
    tensors = [
        ("token_embd.weight", np.array(model.embedding[...])),
        ("output_norm.weight", np.array(model.norm.scale[...])),
    ]
    if not c.tie_embeddings:
        tensors.append(("output.weight", np.array(model.lm_head[...])))
    for name, (leaf, heads) in names.items():
        for layer, value in enumerate(np.array(leaf[...])):
            stored = np.ascontiguousarray(value.T)
            if heads:
                halves = stored.reshape(heads, 2, stored.shape[0] // heads // 2, stored.shape[1])
                stored = halves.swapaxes(1, 2).reshape(stored.shape)
            tensors.append((f"blk.{layer}.{name}.weight", stored))
    settings = {
        "block_count": c.num_layers, "context_length": c.max_positions, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "attention__head_count": c.num_heads,
        "attention__head_count_kv": c.num_kv_heads, "attention__key_length": c.head_dim, "vocab_size": c.vocab_size,
        "rope__freq_base": c.rope.theta, "attention__layer_norm_rms_epsilon": c.norm_eps,
    }  # fmt: skip
    return write_gguf(path, tensors=tensors, tokenizer={}, **(settings | changes))

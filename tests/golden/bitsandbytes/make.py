"""Writes the folders beside this file: tiny models whose matrices bitsandbytes stored in 4 bits, and their logits.

Runs in an environment of its own (Python 3.11, torch 2.13.0 on a CPU, transformers 5.23.0, bitsandbytes 0.50.2,
accelerate), without arguments.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Phi3Config

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
QLORA = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
CASES = {
    "nf4": (LlamaConfig(**SHAPE), QLORA),
    "nf4_bf16_storage": (LlamaConfig(**SHAPE), QLORA | {"bnb_4bit_quant_storage": torch.bfloat16}),
    "nf4_fused": (Phi3Config(**SHAPE), QLORA),
    "nf4_plain_scales": (LlamaConfig(**SHAPE), {"bnb_4bit_quant_type": "nf4"}),
    "fp4": (LlamaConfig(**SHAPE), {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
}

tokens = torch.arange(24).reshape(2, 12) * 7 % 96
for name, (config, settings) in CASES.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data *= 4
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, dtype=torch.float32, device_map="cpu"
        )
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    name_of_one, one = next(
        (n, m) for n, m in model.named_modules() if hasattr(getattr(m, "weight", None), "quant_state")
    )
    matrix = dequantize_4bit(one.weight.data, one.weight.quant_state).float().numpy()
    with torch.no_grad():
        logits = model(tokens).logits.float().numpy()
    golden = {"tokens": tokens.numpy(), "logits": logits, "name": f"{name_of_one}.weight", "matrix": matrix}
    np.savez_compressed(HERE / name / "golden.npz", **golden)

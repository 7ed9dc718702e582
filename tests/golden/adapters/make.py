"""Writes one folder per adapter: random LoRA weights on a tiny model, and what PyTorch computes with both.

Runs in an environment of its own (Python 3.11, torch 2.13.0, transformers 5.23.0, peft 0.21.2, numpy 2.4.6) on the
models that `tests/golden/families/make.py` has written:

    python tests/golden/adapters/make.py [NAME ...]

Every folder holds

* `adapter_config.json` and `adapter_model.safetensors` as `save_pretrained` of `peft` writes them; the base model is
  named by its path in the repository;
* `golden.npz`: `tokens` [2, 12], `logits` of the adapted model (eager attention, float32; [2, 1] from a sequence
  classifier), and `versions`.
"""

import os
import pathlib
import shutil
import sys
import zlib

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
FAMILIES = HERE.parent / "families"
PATTERNS = {
    "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "rank_pattern": {"q_proj": 2, "model.layers.1.self_attn.v_proj": 5, "^model.layers.[02].mlp.down_proj": 3},
    # The second key gets what the first one has left. `peft` sorts them as it saves: this is their order already.
    "alpha_pattern": {"^model.layers.2.mlp.up_proj": 1, "mlp.up_proj": 16, "o_proj": 5},
}
# Name: (base model, settings); r = 4 and alpha = 8 where they do not say.
ADAPTERS = {
    "llama_qv": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "llama_all_rslora": ("llama", {"target_modules": "all-linear", "lora_alpha": 6, "use_rslora": True}),
    "llama_patterns": ("llama", PATTERNS),
    "llama_top_layers": (
        "llama",
        {"target_modules": ["k_proj", "o_proj", "gate_proj", "down_proj"], "layers_to_transform": [1, 2]},
    ),
    "gpt2_c_attn": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt2_all": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt_neox_all": ("gpt_neox", {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}),
    "phi3_fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "gemma2_all": ("gemma2", {"target_modules": "all-linear"}),
    "qwen3_all": ("qwen3", {"target_modules": "all-linear"}),
    "mistral_mlp": ("mistral", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "qwen3_reward": ("qwen3", {"target_modules": ["q_proj", "down_proj"], "task_type": "SEQ_CLS"}),
}


def base_model(name: str):
    """A sequence classifier has a head of zeros here; the adapter brings its own."""
    family, settings = ADAPTERS[name]
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    if settings.get("task_type") != "SEQ_CLS":
        return transformers.AutoModelForCausalLM.from_pretrained(FAMILIES / family, **options)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(FAMILIES / family, num_labels=1, **options)
    model.score.weight.data.zero_()
    return model


def logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


def make(name: str) -> None:
    family, settings = ADAPTERS[name]
    folder = HERE / name
    random = np.random.default_rng(zlib.crc32(name.encode()))
    tokens = random.integers(3, 64, (2, 12), dtype=np.int32)
    plain = logits(base_model(name), tokens)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | settings)
    model = peft.get_peft_model(base_model(name), config)
    for key, parameter in sorted(model.named_parameters()):
        if "lora_" in key or "modules_to_save" in key:
            values = random.normal(0, 0.1, tuple(parameter.shape))
            parameter.data = torch.tensor(values, dtype=torch.float32)
    adapted = logits(model, tokens)
    change = np.abs(adapted - plain).max()
    assert 0.2 < change < 20, change

    shutil.rmtree(folder, ignore_errors=True)
    saved = model.peft_config["default"]
    saved.base_model_name_or_path = f"tests/golden/families/{family}"
    saved.target_modules = sorted(saved.target_modules)  # a set, in another order every time
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    again = peft.PeftModel.from_pretrained(base_model(name), folder)
    np.testing.assert_allclose(logits(again, tokens), adapted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(logits(again.merge_and_unload(), tokens), adapted, rtol=0, atol=1e-4)
    modules = (torch, transformers, peft)
    versions = np.array([f"{module.__name__} {module.__version__}" for module in modules])
    np.savez_compressed(folder / "golden.npz", tokens=tokens, logits=adapted, versions=versions)
    print(f"{name}: changes logits by {change:.2f} of {np.abs(plain).max():.2f}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    for name in sys.argv[1:] or ADAPTERS:
        make(name)


if __name__ == "__main__":
    main()

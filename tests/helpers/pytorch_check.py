"""Run by `tests/models/test_pytorch.py` in an environment with torch, transformers and peft:

    python tests/helpers/pytorch_check.py FOLDER OUT.npz

Loads every folder below FOLDER that holds a `config.json` (a model) or an `adapter_config.json` (an adapter; its base
model is named by its path below FOLDER), as their users would, and runs it in float32 on the `tokens` and `mask` of
FOLDER/batch.npz. OUT.npz gets, by the folder's path below FOLDER: the logits; after `:dtype` that of the loaded
weights; after `:problems` the keys that are missing, unexpected or mismatched.
"""

import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file


def load(folder: pathlib.Path):
    """Returns a model and what does not fit."""
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    is_classifier = architecture.endswith("ForSequenceClassification")
    kind = transformers.AutoModelForSequenceClassification if is_classifier else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, dtype="auto", attn_implementation="eager", output_loading_info=True)
    problems = [f"{kind}: {key}" for kind, keys in info.items() for key in keys]
    if type(model).__name__ != architecture:
        problems.append(f"loaded as {type(model).__name__}")
    return model, problems


def load_adapter(root: pathlib.Path, folder: pathlib.Path):
    """Returns an adapted model and what does not fit."""
    base, problems = load(root / PeftConfig.from_pretrained(folder).base_model_name_or_path)
    model = PeftModel.from_pretrained(base, folder)
    stored, taken = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    problems += [f"not in both: {key}" for key in stored.keys() ^ taken.keys()]
    problems += [f"differs: {key}" for key in stored.keys() & taken.keys() if not torch.equal(stored[key], taken[key])]
    return model, problems


def main(root: pathlib.Path, out: pathlib.Path) -> None:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    with np.load(root / "batch.npz") as batch:
        inputs = {
            "input_ids": torch.tensor(batch["tokens"]).long(),
            "attention_mask": torch.tensor(batch["mask"]).long(),
        }
    results = {}
    for file in sorted([*root.rglob("config.json"), *root.rglob("adapter_config.json")]):
        name = str(file.parent.relative_to(root))
        is_adapter = file.name == "adapter_config.json"
        model, problems = load_adapter(root, file.parent) if is_adapter else load(file.parent)
        results[f"{name}:dtype"] = np.array(str(model.dtype))
        results[f"{name}:problems"] = np.array(problems, dtype=str)
        with torch.no_grad():
            results[name] = model.float().eval()(**inputs, use_cache=False).logits.numpy()
    np.savez(out, **results)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))

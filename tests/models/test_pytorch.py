"""What we write, read by others: byte for byte, by transformers' configurations, and in PyTorch (slow)."""

import json
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast

from rapidfire_jax import FlaxAutoModelForCausalLM
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.models.lora import add_lora, projections
from rapidfire_jax.models.peft import load_adapter, save_adapter

ROOT = Path(__file__).parents[2]
FAMILIES = ROOT / "tests/golden/families"
CASES = sorted(folder.name for folder in FAMILIES.iterdir() if folder.is_dir())
MODEL = "model.safetensors"
PYTORCH = ("--no-project", "--python", "3.11", "--with", "torch==2.13.0", "--with", "transformers==5.23.0")
PYTORCH += ("--with", "peft==0.21.2")
CHECK = ROOT / "tests/helpers/pytorch_check.py"
load = FlaxAutoModelForCausalLM.from_pretrained

# Of a configuration, without effect on what the model computes: names and versions; what `layer_types` says as well.
IGNORED = {"_name_or_path", "transformers_version"}
IGNORED |= {"sliding_window_pattern", "_sliding_window_pattern", "max_window_layers"}
FOR_OLDER_READERS = {"head_dim", "hidden_activation", "partial_rotary_factor"}  # written although not asked for


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}, "w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.supports("export")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_comes_back_byte_for_byte(name, dtype, tmp_path):
    tensors = {key: value.astype(jnp.dtype(dtype)) for key, value in load_file(FAMILIES / name / MODEL).items()}
    shutil.copy(FAMILIES / name / "config.json", tmp_path)
    save_file(tensors, tmp_path / MODEL, {"format": "pt"})
    save_pretrained(load(str(tmp_path), dtype="auto"), tmp_path / "again")
    assert (tmp_path / "again" / MODEL).read_bytes() == (tmp_path / MODEL).read_bytes()
    assert json.loads((tmp_path / "again/config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.supports("export")
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_same_configuration(name, tokenizer, tmp_path):
    save_pretrained(load(str(FAMILIES / name)), tmp_path / "m", tokenizer)
    expected, found = (AutoConfig.from_pretrained(folder).to_dict() for folder in (FAMILIES / name, tmp_path / "m"))
    if expected["model_type"] == "gpt2":
        expected["n_inner"] = expected["n_inner"] or 4 * expected["n_embd"]
    if "full_attention" in expected.get("rope_parameters", {}):
        for config in (expected, found):
            config |= {f"rope_{kind}": values for kind, values in config.pop("rope_parameters").items()}
    for key in expected.keys() - IGNORED:
        if key.startswith("rope_"):  # ours also spells out what follows from the rest
            assert found[key] | expected[key] == found[key], key
        else:
            assert found[key] == expected[key], key
    assert found.keys() - expected.keys() <= FOR_OLDER_READERS


@jax.jit
def forward(model, tokens, mask):
    return model(tokens, mask)


def adapted(name, targets="all-linear", layers=None, *, rslora=False):
    """A model with adapters of ours whose B is not zero."""
    model = load(str(FAMILIES / name))
    add_lora(model, rank=3, alpha=6.0, targets=targets, key=jax.random.key(0), layers=layers, rslora=rslora)
    random = np.random.default_rng(0)
    for projection in projections(model, targets):
        b = getattr(model.stacks[-1], projection).lora_b
        b[...] = jnp.asarray(random.normal(0, 0.1, b.shape), jnp.float32)
    return model


def write_everything(root, tokenizer):
    """Models and adapters below `root`, sharded; name -> the model that computes what they should."""
    models = {}
    for name in CASES:
        models[name] = load(str(FAMILIES / name))
        models[f"{name}-reward"] = RewardModel.from_causal(models[name], jax.random.key(1))
        models[f"{name}-adapter"] = adapted(name)
        models[f"{name}-merged"] = models[f"{name}-adapter"]
    for name in ("llama", "gpt2", "gpt_neox", "phi3"):
        models[f"{name}-partial-adapter"] = adapted(name, ("q_proj", "v_proj", "up_proj"), 2, rslora=True)
    models["llama-irregular-adapter"] = load(str(FAMILIES / "llama"))
    models["llama-irregular-adapter"].split_blocks(1)
    load_adapter(models["llama-irregular-adapter"], str(ROOT / "tests/golden/adapters/llama_patterns"))
    models["qwen3-reward-adapter"] = RewardModel.from_causal(models["qwen3"], jax.random.key(1))
    load_adapter(models["qwen3-reward-adapter"], str(ROOT / "tests/golden/adapters/qwen3_all"))
    models["llama-bfloat16"] = load(str(FAMILIES / "llama"), dtype="bfloat16", compute_dtype="float32")
    for name, model in models.items():
        if name.endswith("-adapter"):
            base = name.removesuffix("-adapter") if "reward" in name else name.partition("-")[0]
            save_adapter(model, root / name, base_model_name=base, rslora="partial" in name)
        else:
            save_pretrained(model, root / name, tokenizer, max_shard_bytes=20_000)
            assert len(list((root / name).glob("model-*.safetensors"))) >= 2
    return models


@pytest.mark.slow
def test_pytorch_computes_the_same(tokenizer, tmp_path):
    """Every family as a language model, a reward model and an adapter, in transformers and `peft`."""
    uv = shutil.which("uv")
    assert uv is not None, "this test needs uv, which brings an environment with PyTorch: https://docs.astral.sh/uv"
    random = np.random.default_rng(0)
    tokens, mask = random.integers(3, 64, (4, 40), dtype=np.int32), np.ones((4, 40), bool)
    tokens[1, 33:], mask[1, 33:] = 0, False
    root, out = tmp_path / "written", tmp_path / "out.npz"
    models = write_everything(root, tokenizer)
    np.savez(root / "batch.npz", tokens=tokens, mask=mask)
    subprocess.run([uv, "run", *PYTORCH, "python", "-W", "ignore", CHECK, root, out], check=True)
    differences, problems = {}, {}
    with np.load(out) as found:
        assert {name for name in found if ":" not in name} == models.keys()
        for name, model in models.items():
            expected = np.asarray(forward(model, tokens, mask))
            real = np.ones(4, bool) if "reward" in name else mask
            logits = found[name][..., 0] if "reward" in name else found[name]
            if name.startswith("llama_dynamic"):  # transformers takes the longest row's length for all
                logits, expected, real = logits[:1], expected[:1], real[:1]
            differences[name] = np.abs(logits - expected)[real].max() / np.abs(expected[real]).max()
            problems |= {name: list(found[f"{name}:problems"])} if found[f"{name}:problems"].size else {}
            assert found[f"{name}:dtype"] == f"torch.{'bfloat16' if 'bfloat16' in name else 'float32'}"
    print(*(f"{value:.1e} {name}" for name, value in sorted(differences.items())), sep="\n")
    assert not problems
    assert max(differences.values()) < 1e-4, differences

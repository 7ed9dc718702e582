"""A whole job small enough to run in seconds: tiny model folder, prompts, a reward that counts a letter."""

from pathlib import Path

import pytest
import yaml

from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.tokenizer import load_tokenizer
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tiny import tiny_model

REWARDS = '''
"""Rewards of the tests."""

def letters(prompts, responses, letter="e"):
    return [sum(c == letter for c in text) / (1 + len(text)) for text in responses]

def broken(prompts, responses):
    raise KeyError("no such thing")

def nan(prompts, responses):
    return [float("nan")] * len(responses)

def short(prompts, responses):
    return [0.0]

CALLS = 0
def breaks_later(prompts, responses):
    global CALLS
    CALLS += 1
    if CALLS > 4:
        raise RuntimeError("out of quota")
    return [0.5] * len(responses)
'''


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """A folder with `model/`, `prompts.jsonl` and `tiny_rewards.py`."""
    folder = tmp_path_factory.mktemp("assets")
    tokenizer = load_tokenizer(str(write_gguf(folder / "tokenizer.gguf", tokenizer={})))
    save_pretrained(tiny_model(vocab_size=len(tokenizer)), folder / "model", tokenizer)
    words = ["a", "the", "red", "old", "tree", "sea", "he", "we"]
    lines = [f'{{"prompt": "{x} {y} {z}"}}' for x in words for y in words for z in words]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tiny_rewards.py").write_text(REWARDS, encoding="utf-8")
    return folder


@pytest.fixture
def job(assets, tmp_path, monkeypatch):
    """Writes the configuration with `changes` merged in, returns its path. The working directory holds the rewards."""
    monkeypatch.chdir(assets)

    def write(**changes) -> Path:
        tree = {
            "task": "ppo",
            "run_dir": str(tmp_path / "run"),
            "model": {"name": str(assets / "model")},
            "adapter": {"rank": 4, "layers": 2},
            "data": {
                "path": str(assets / "prompts.jsonl"),
                "max_prompt_length": 32,
                "train": [0.0, 0.8],
                "held_out": [0.8, 1.0],
            },
            "reward": {"function": "tiny_rewards:letters"},
            "rollout": {"batch_size": 8, "max_new_tokens": 6},
            "rl": {"epochs": 2, "minibatches": 2},
            "optimizer": {"learning_rate": 0.01, "schedule": "linear", "warmup": 1},
            "training": {"iterations": 4, "checkpoint_every": 2, "eval_prompts": 12},
        }
        for section, values in changes.items():
            tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write

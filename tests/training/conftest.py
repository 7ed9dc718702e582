"""A whole job small enough to run in seconds: tiny model folder, prompts, a reward that counts a letter."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from rapidfire_jax.config import load_config
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.tokenizer import load_tokenizer
from rapidfire_jax.training.job import make_job, train
from rapidfire_jax.training.run_directory import RunDirectory
from tests.helpers.compilations import compilations
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

def characters(prompts, responses):
    return [len(text) / 10 for text in responses]

def plain(prompts, responses):
    return [sum(c.isascii() for c in text) / (1 + len(text)) for text in responses]

def even(prompts, responses, response_tokens):
    return [[float(token % 2 == 0) for token in row] for row in response_tokens]

BREAK_AT, SCORED = None, 0
def brief_until(prompts, responses):
    global BREAK_AT, SCORED
    SCORED += 1
    if SCORED == BREAK_AT:
        raise RuntimeError("out of quota")
    return [float(len(text) < 6) for text in responses]
'''


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """A folder with `model/`, `prompts.jsonl` and `tiny_rewards.py`."""
    folder = tmp_path_factory.mktemp("assets")
    tokenizer = load_tokenizer(str(write_gguf(folder / "tokenizer.gguf", tokenizer={})))
    save_pretrained(tiny_model(vocab_size=len(tokenizer)), folder / "model", tokenizer)
    words = ["a", "the", "red", "old", "tree", "sea", "he", "we", "see", "my"]
    texts = [f"{x} {y} {z}" for x in words for y in words for z in words]
    # Prompts of one bucket: a run compiles its programs once.
    lines = [json.dumps({"prompt": text}) for text in texts if 8 < len(tokenizer(text)["input_ids"]) <= 16]
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


@pytest.fixture
def finish():
    """Trains a job to its end, in a new run directory unless one is given, and checks what holds for every job.

    Returns its run directory, the `Job` itself, summary and metrics.
    """

    def finish(path: Path | None, run: RunDirectory | None = None) -> SimpleNamespace:
        if run is None:
            run = RunDirectory.create(load_config(path))
        config, compiled, jobs = run.load_config(), {}, []

        def make(config):
            job = make_job(config)
            iterate = job.iterate

            def counted(iteration):
                with compilations() as found:
                    metrics = iterate(iteration)
                compiled[iteration] = found
                return metrics

            job.iterate = counted
            jobs.append(job)
            return job

        summary = train(config, run, make)
        assert not [program for iteration in list(compiled)[1:] for program in compiled[iteration]]
        records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        assert all(np.isfinite(v) for r in records for v in r.values() if isinstance(v, int | float))
        wanted = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "plots", "checkpoints", "final"}
        assert wanted <= {file.name for file in run.path.iterdir()}
        assert any(run.plots.iterdir()) and any(run.checkpoints.iterdir())
        assert json.loads(run.summary.read_text()) == summary
        learnt = [record for record in records if "phase" not in record]
        assert [r["iteration"] for r in learnt] == list(range(1, jobs[0].iterations + 1))
        return SimpleNamespace(run=run, job=jobs[0], summary=summary, records=learnt)

    return finish

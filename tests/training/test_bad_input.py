"""Every kind of bad input ends with exit code 2 and one readable message, before training."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from rapidfire_jax.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def check(result, *words: str):
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.output + result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rl": {"kl_coeff": 0.1}}, ["rl.kl_coeff", "kl_coef"]),
        ({"trainin": {"iterations": 1}}, ["trainin", "training"]),
        ({"rl": {"clip_range": -0.2}}, ["rl.clip_range", "-0.2", "greater than 0"]),
        ({"rl": {"epochs": "four"}}, ["rl.epochs", "four", "integer"]),
        ({"rl": {"epochs": 1.5}}, ["rl.epochs", "1.5"]),
        ({"rl": {"kl_coef": float("nan")}}, ["rl.kl_coef", "nan"]),
        ({"task": "pop"}, ["task", "pop", "ppo"]),
        ({"rl": {"minibatches": 3}}, ["rl.minibatches=3", "rollout.batch_size=8"]),
        ({"data": {"train": [0.0, 0.9]}}, ["overlap"]),
        ({"model": {"name": "/no/such/model"}}, ["/no/such/model"]),
        ({"adapter": {"targets": ["q_prj"]}}, ["q_prj", "q_proj"]),
        ({"adapter": {"layers": 9}}, ["adapter.layers=9", "3 layers"]),
        ({"data": {"path": "/no/such/prompts.jsonl"}}, ["/no/such/prompts.jsonl"]),
        ({"data": {"column": "text"}}, ["text", "prompt"]),
        ({"data": {"max_prompt_length": 2}}, ["max_prompt_length"]),
        ({"rollout": {"max_new_tokens": 126}}, ["context 128"]),
        ({"rollout": {"max_new_tokens": 128}}, ["max_new_tokens=128", "context of 128"]),
        ({"training": {"eval_prompts": 9999}}, ["9999"]),
        ({"reward": {"function": "tiny_rewards:leters"}}, ["leters", "letters"]),
        ({"reward": {"function": "no_such_module:f"}}, ["no_such_module"]),
        ({"reward": {"function": "tiny_rewards:letters", "args": {"lettre": "a"}}}, ["lettre", "letter"]),
        ({"reward": {"function": "tiny_rewards:broken"}}, ["tiny_rewards:broken", "no such thing"]),
        ({"reward": {"function": "tiny_rewards:nan"}}, ["tiny_rewards:nan", "nan"]),
        ({"reward": {"function": "tiny_rewards:short"}}, ["tiny_rewards:short", "one number"]),
        ({"run_dir": "/proc/nowhere/run"}, ["/proc/nowhere/run"]),
    ],
)
def test_configurations(job, tmp_path, changes, words):
    check(run("train", job(**changes)), *words)
    assert not (tmp_path / "run" / "config.yaml").exists()  # a run that never began is not in the way of the next


def test_overrides(job):
    check(run("train", job(), "rl.kl_coef"), "rl.kl_coef", "section.key=value")
    check(run("train", job(), "rl.kl_coef=-1"), "rl.kl_coef", "-1")
    check(run("train", job(), "seed.x=1"), "seed")


def test_files(job, tmp_path):
    check(run("train", tmp_path / "none.yaml"), "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    check(run("train", tmp_path / "list.yaml"), "list.yaml", "list")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    check(run("train", tmp_path / "broken.yaml"), "broken.yaml")
    check(run("train"), "--resume")
    check(run("train", "--resume", tmp_path), "not a run directory")
    (tmp_path / "empty.jsonl").write_text("")
    check(run("train", job(data={"path": str(tmp_path / "empty.jsonl")})), "empty.jsonl")


def damaged(assets, tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(assets / "model", folder)
    change(folder)
    return {"name": str(folder)}


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_models(job, assets, tmp_path):
    def truncate(folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])

    check(run("train", job(model=damaged(assets, tmp_path, truncate))), "model.safetensors")


def test_architectures(job, assets, tmp_path):
    change = lambda folder: edit_json(folder / "config.json", model_type="mamba")  # noqa: E731
    check(run("train", job(model=damaged(assets, tmp_path, change))), "mamba", "llama")


def test_tokenizers_without_eos(job, assets, tmp_path):
    change = lambda folder: edit_json(folder / "tokenizer_config.json", eos_token=None)  # noqa: E731
    check(run("train", job(model=damaged(assets, tmp_path, change))), "eos")


def test_prompts_of_generate(job, assets):
    check(run("generate", assets / "model", "--prompt", "the sea " * 100), "tokens", "128")
    check(run("generate", assets / "model", "--prompt", ""), "0 tokens")
    check(run("generate", "/no/such/model", "--prompt", "a"), "/no/such/model")


def test_debug_shows_the_traceback(job):
    result = run("train", job(rl={"clip_range": -1}), "--debug")
    assert result.exit_code == 2 and "Traceback" in result.stderr

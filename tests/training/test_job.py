"""A whole run in the process: what it leaves behind, resuming, interrupting, failing."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from rapidfire_jax.cli import app
from rapidfire_jax.config import load_config
from rapidfire_jax.models.auto import FlaxAutoModelForCausalLM
from rapidfire_jax.training.interrupt import Interrupted, InterruptGuard
from rapidfire_jax.training.job import learning_rate, train
from rapidfire_jax.training.online import OnlineJob
from rapidfire_jax.training.run_directory import RunDirectory
from tests.helpers.compilations import compilations

TIMING = ("seconds", "tokens_per_second", "peak_bytes")


def start(path):
    config = load_config(path)
    return config, RunDirectory.create(config)


def numbers(run):
    """metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(TIMING)} for r in records]


def test_a_run_leaves_everything_behind(job):
    config, run = start(job())
    summary = train(config, run)
    assert run.load_config() == config
    assert set(summary) == {"before", "after", "seconds", "iterations", "tokens_per_second", "peak_bytes"}
    assert set(summary["before"]) == {"reward", "kl", "response_length", "distinct_2"}
    assert json.loads(run.summary.read_text()) == summary
    assert abs(summary["before"]["kl"]) < 1e-4 and summary["iterations"] == 4
    names = {"reward", "kl", "entropy", "explained_variance", "response_length", "time"}
    assert {p.stem for p in run.plots.iterdir()} == names
    samples = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert [s["phase"] for s in samples] == ["before"] * 12 + ["after"] * 12
    assert np.isclose(np.mean([s["reward"] for s in samples[12:]]), summary["after"]["reward"])
    assert json.loads((run.path / "environment.json").read_text())["versions"]["jax"] == jax.__version__
    assert list(run.tensorboard.glob("events.*"))
    assert (run.final / "adapter/adapter_model.safetensors").is_file()
    records = numbers(run)
    assert [r["iteration"] for r in records] == [0, 1, 2, 3, 4, 4]
    assert max(r["policy/ratio_first"] for r in records if "kl" in r) <= 1e-5
    assert records[1]["kl"] == pytest.approx(0, abs=1e-4)


def test_exported_policy_is_the_trained_policy(job):
    config, run = start(job(training={"iterations": 1}))
    train(config, run)
    ours = OnlineJob(config)
    ours.iterate(0)
    model = ours.policy.merge(ours.state.frozen, ours.state.trainable)
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    exported = FlaxAutoModelForCausalLM.from_pretrained(str(run.final))
    np.testing.assert_allclose(exported(tokens), model(tokens), rtol=1e-4, atol=1e-4)


def test_second_iteration_compiles_nothing(job):
    ours = OnlineJob(load_config(job()))
    ours.iterate(0)
    with compilations() as found:
        ours.iterate(1)
    assert not found


@pytest.mark.parametrize("adapter", [{"type": "lora", "layers": None}, {"type": "none"}])
def test_only_the_trainable_tree_changes(job, adapter):
    ours = OnlineJob(load_config(job(adapter=adapter, rollout={"log_probs": "reuse"})))
    before = jax.tree.map(np.array, (ours.state.frozen, ours.state.trainable))
    metrics = ours.iterate(0)
    frozen, trainable = before
    jax.tree.map(np.testing.assert_array_equal, ours.state.frozen, frozen)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), ours.state.trainable, trainable)
    assert all(jax.tree.leaves(changed))
    # With "reuse" the old log-probabilities come from cached decoding, which rounds otherwise than a full forward pass.
    assert metrics["policy/ratio_first"] < 1e-4 and ours.state.step == 4


def test_interrupted_and_resumed_equals_uninterrupted(job, tmp_path, monkeypatch):
    config, run = start(job())
    train(config, run)
    iterate = OnlineJob.iterate
    # Stopped in the first iteration, and in one whose checkpoint is not the newest.
    for stop_after in (1, 3):
        config, broken_run = start(job(run_dir=str(tmp_path / f"interrupted-{stop_after}")))

        def killed(self, iteration, stop_after=stop_after):
            if iteration == stop_after - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return iterate(self, iteration)

        monkeypatch.setattr(OnlineJob, "iterate", killed)
        with pytest.raises(Interrupted, match="--resume") as stop:
            train(config, broken_run)
        assert stop.value.exit_code == 143
        monkeypatch.setattr(OnlineJob, "iterate", iterate)
        with broken_run.metrics.open("a") as file:  # as if killed between a record and its checkpoint
            file.write('{"iteration": 99}\n{"iteration": 0, "pha')
        train(broken_run.load_config(), broken_run)
        assert numbers(broken_run) == numbers(run)
        for file in ("samples.jsonl", "final/model.safetensors", "final/adapter/adapter_model.safetensors"):
            assert (broken_run.path / file).read_bytes() == (run.path / file).read_bytes()
    before = numbers(run)
    train(config, run)  # a finished run: evaluated and exported again, and nothing else
    assert numbers(run) == before


def test_a_reward_that_breaks_during_training_saves_first(job):
    config, run = start(job(reward={"function": "tiny_rewards:breaks_later"}))
    with pytest.raises(ValueError, match="out of quota"):
        train(config, run)
    assert [p.name for p in run.checkpoints.iterdir()] == ["2"]


def test_a_loss_that_is_not_finite_stops_the_run(job):
    ours = OnlineJob(load_config(job()))
    ours.state = dataclasses.replace(ours.state, trainable=jax.tree.map(lambda x: x * np.nan, ours.state.trainable))
    with pytest.raises(FloatingPointError, match="iteration 1"):
        ours.iterate(0)


def test_runs_are_never_overwritten(job):
    config = load_config(job())
    first, second = RunDirectory.create(config), RunDirectory.create(config)
    assert second.path.name == "run-2" and first.load_config() == second.load_config() == config


def test_second_signal_stops_at_once():
    with InterruptGuard() as guard:
        guard.defer = True
        signal.raise_signal(signal.SIGINT)
        assert guard.signum == signal.SIGINT
        with pytest.raises(Interrupted) as stop:
            signal.raise_signal(signal.SIGINT)
    assert stop.value.exit_code == 130


def test_learning_rate_schedules():
    from rapidfire_jax.config import OptimizerConfig

    rates = lambda **k: [learning_rate(OptimizerConfig(learning_rate=1.0, **k), i, 6) for i in range(6)]  # noqa: E731
    assert rates() == [1.0] * 6
    np.testing.assert_allclose(rates(schedule="linear"), [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    np.testing.assert_allclose(rates(warmup=3), [0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(rates(schedule="cosine")[3], 0.5)


def test_generate_command(job, assets):
    runner = CliRunner()
    arguments = ["generate", str(assets / "model"), "--prompt", "the sea", "--prompt", "we", "--max-new-tokens", "5"]
    one, two = (runner.invoke(app, [*arguments, "--temperature", "0"]) for _ in range(2))
    assert one.exit_code == 0 and one.output == two.output and "the sea\n-> " in one.output

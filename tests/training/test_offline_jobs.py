"""Jobs of the tasks that learn from data: what they leave behind, resuming, and what they refuse."""

import json
import math
import os
import signal

import jax
import numpy as np
import pytest
import yaml

from rapidfire_jax.config import load_config
from rapidfire_jax.models.auto import FlaxAutoModelForCausalLM, FlaxAutoModelForSequenceClassification
from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.training.interrupt import Interrupted
from rapidfire_jax.training.job import train
from rapidfire_jax.training.offline import OfflineJob
from rapidfire_jax.training.run_directory import RunDirectory
from tests.training.test_bad_input import check, run
from tests.training.test_job import numbers

WORDS = ["red", "old", "sea", "oak", "day", "cup", "fog", "bud"]  # of one length, so that a job has one bucket
PROMPTS = [f"{x} {y}" for x in WORDS for y in WORDS]
DATA = {
    "completions": [{"prompt": f"{p} ", "completion": p.split()[0]} for p in PROMPTS],
    "texts": [{"text": f"the {p} and so on"} for p in PROMPTS],
    "preferences": [
        {"prompt": f"{p} ", "chosen": f"good {p[:3]}", "rejected": "bad", "margin": i % 3}
        for i, p in enumerate(PROMPTS)
    ],
    "labelled": [{"text": f"{p} {['no no', 'sure!'][i % 2]}", "label": i % 2} for i, p in enumerate(PROMPTS)],
    "probabilities": [{"text": p, "label": 3 if p == "sea oak" else 0.25} for p in PROMPTS],
}
TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a file of every kind of example."""
    folder = tmp_path_factory.mktemp("examples")
    for name, records in DATA.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return folder


@pytest.fixture
def offline(assets, data, tmp_path):
    """Writes the configuration of a task on one of the files, `changes` merged in; its path."""

    def write(task, file, **changes):
        tree = {
            "task": task,
            "run_dir": str(tmp_path / "run"),
            "model": {"name": str(assets / "model")},
            "adapter": {"rank": 2, "layers": 1, "targets": ["q_proj", "down_proj"]},
            "data": {"path": str(data / f"{file}.jsonl"), "max_length": 32, "train": [0.0, 0.7], "held_out": [0.7, 1]},
            task: {"batch_size": 4},
            "optimizer": {"learning_rate": 0.02},
            "training": {"iterations": 4, "checkpoint_every": 2, "eval_examples": 6},
            "logging": {"tensorboard": False},
        }
        for section, values in changes.items():
            tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


def assert_exported(done):
    """`final` holds the trained model, which is not the one that it started from."""
    kind = (
        FlaxAutoModelForSequenceClassification
        if done.job.algorithm.model == "reward_model"
        else (FlaxAutoModelForCausalLM)
    )
    ours = done.job.trainee.model.merge(done.job.state.frozen, done.job.state.trainable)
    exported = kind.from_pretrained(str(done.run.final))
    assert isinstance(ours, RewardModel) == isinstance(exported, RewardModel)
    np.testing.assert_allclose(exported(TOKENS), ours(TOKENS), rtol=1e-4, atol=1e-4)
    start = OfflineJob(done.job.config)
    untrained = start.trainee.model.merge(start.state.frozen, start.state.trainable)
    assert np.abs(np.asarray(untrained(TOKENS) - ours(TOKENS))).max() > 1e-3
    assert (done.run.final / "adapter/adapter_config.json").is_file()


def test_sft_packed_and_not(offline, finish, tmp_path):
    packed = finish(offline("sft", "completions"))
    assert_exported(packed)
    rows = packed.job.batches.train(0)
    assert rows.tokens.shape == (4, 32) and int(rows.segments.max()) > 1
    assert packed.summary["after"]["loss"] < packed.summary["before"]["loss"] - 0.1
    assert packed.summary["before"]["nll"] == pytest.approx(packed.summary["before"]["loss"])

    once = {"iterations": None, "epochs": 0.25}
    single = finish(offline("sft", "completions", sft={"packing": False}, training=once))
    assert int(single.job.batches.train(0).segments.max()) == 1
    assert single.job.iterations == len(single.records) == math.ceil(0.25 * single.job.batches.rows / 4)
    # The same held-out examples have the same loss, each in a row of its own or several in one.
    assert single.summary["before"]["loss"] == pytest.approx(packed.summary["before"]["loss"], abs=1e-4)

    # The next stage starts where this one ended.
    final = {"model": {"name": str(packed.run.final)}, "run_dir": str(tmp_path / "next")}
    following = OfflineJob(load_config(offline("sft", "completions", **final)))
    assert following.evaluate()[0]["loss"] == pytest.approx(packed.summary["after"]["loss"], abs=1e-4)


def test_sft_on_texts_trains_on_every_token_but_the_first(offline):
    job = OfflineJob(load_config(offline("sft", "texts", adapter={"type": "none"}, sft={"micro_batches": 2})))
    batch = job.batches.train(0)
    assert int(batch.trained.sum()) == int((batch.segments > 0).sum()) - sum(int(row.max()) for row in batch.segments)
    losses = [job.iterate(i)["loss/total"] for i in range(4)]
    assert losses[-1] < losses[0] - 0.1
    whole = OfflineJob(load_config(offline("sft", "texts", adapter={"type": "none"})))
    assert [whole.iterate(i)["loss/total"] for i in range(2)] == pytest.approx(losses[:2], rel=1e-4)


def test_reward_model_from_preferences(offline, finish):
    done = finish(offline("reward_model", "preferences", reward_model={"margin_coef": 0.1, "centre_coef": 0.01}))
    assert_exported(done)
    assert done.summary["after"]["accuracy"] == 1.0
    assert done.summary["after"]["margin"] > done.summary["before"]["margin"] + 0.1
    margins = done.job.batches.train(0).margin
    assert set(np.asarray(margins).tolist()) <= {0.0, 1.0, 2.0}

    # A reward model is trained on as it is, its head included.
    again = OfflineJob(load_config(offline("reward_model", "preferences", model={"name": str(done.run.final)})))
    assert again.evaluate()[0]["margin"] == pytest.approx(done.summary["after"]["margin"], abs=1e-4)


def test_reward_model_from_labelled_texts(offline, finish):
    done = finish(offline("reward_model", "labelled", training={"iterations": 8}))
    assert_exported(done)
    assert done.summary["after"]["loss"] < done.summary["before"]["loss"] - 0.1
    assert set(done.summary["after"]) == {"loss", "accuracy", "score"}


def test_dpo_and_its_resumption(offline, finish, tmp_path, monkeypatch):
    done = finish(offline("dpo", "preferences", dpo={"beta": 0.5, "micro_batches": 2}))
    assert_exported(done)
    before, after = done.summary["before"], done.summary["after"]
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is its own reference
    assert after["loss"] < 0.6 and after["accuracy"] == 1.0
    assert after["margin"] == pytest.approx(after["reward/chosen"] - after["reward/rejected"], abs=1e-4)

    iterate = OfflineJob.iterate
    path = offline("dpo", "preferences", dpo={"beta": 0.5, "micro_batches": 2}, run_dir=str(tmp_path / "stopped"))
    config = load_config(path)
    stopped = RunDirectory.create(config)

    def killed(self, iteration):
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(self, iteration)

    monkeypatch.setattr(OfflineJob, "iterate", killed)
    with pytest.raises(Interrupted, match="after iteration 3") as stop:
        train(config, stopped)
    assert stop.value.exit_code == 143
    monkeypatch.setattr(OfflineJob, "iterate", iterate)
    resumed = train(config, stopped)
    assert numbers(stopped) == numbers(done.run)
    assert (resumed["before"], resumed["after"]) == (before, after)
    for file in ("final/model.safetensors", "final/adapter/adapter_model.safetensors"):
        assert (stopped.path / file).read_bytes() == (done.run.path / file).read_bytes()


def test_variants_of_dpo(offline):
    loss = {"loss": "ipo", "reference_free": True, "average_log_prob": True, "beta": 0.5}
    job = OfflineJob(load_config(offline("dpo", "preferences", dpo=loss, memory={"remat": "full"})))
    margins = [job.iterate(i)["margin"] for i in range(4)]
    assert abs(margins[0]) > 1e-5 and margins[-1] > margins[0]  # without a reference the margin does not start at 0


def test_streamed_examples_resume_where_they_stopped(offline):
    streaming = {"streaming": True, "shuffle_buffer": 8}
    job = OfflineJob(load_config(offline("reward_model", "labelled", data=streaming)))
    batches = [job.batches.train(i) for i in range(3)]
    jax.tree.map(np.testing.assert_array_equal, job.batches.train(2), batches[2])
    again = OfflineJob(load_config(offline("reward_model", "labelled", data=streaming)))
    jax.tree.map(np.testing.assert_array_equal, again.batches.train(2), batches[2])


@pytest.mark.parametrize(
    ("task", "file", "changes", "words"),
    [
        ("sfr", "texts", {}, ["'sfr'", "did you mean 'sft'"]),
        ("sft", "texts", {"rl": {"epochs": 1}}, ["unknown key 'rl'"]),
        ("sft", "texts", {"dpo": {"beta": 0.1}}, ["unknown key 'dpo'"]),
        ("sft", "texts", {"reward": {"function": "a:b"}}, ["unknown key 'reward'"]),
        ("sft", "texts", {"sft": {"beta": 0.1}}, ["sft.beta"]),
        ("sft", "texts", {"sft": {"micro_batches": 3}}, ["sft.batch_size=4", "sft.micro_batches=3"]),
        ("sft", "texts", {"training": {"epochs": 1}}, ["iterations=4", "epochs=1"]),
        ("sft", "texts", {"training": {"iterations": None}}, ["iterations or epochs", "iterations=None"]),
        ("sft", "texts", {"training": {"eval_prompts": 6}}, ["training.eval_prompts", "eval_examples"]),
        ("sft", "texts", {"training": {"eval_examples": 999}}, ["999 are wanted", "held-out"]),
        ("sft", "texts", {"data": {"max_length": 8}}, ["tokens, at most 8", "data.max_length=8", "too_long=drop"]),
        ("sft", "texts", {"data": {"max_length": 8, "too_long": "drop"}}, ["no training examples", "too long"]),
        ("sft", "texts", {"data": {"max_prompt_length": 8}}, ["data.max_prompt_length=8", "data.max_length"]),
        ("sft", "preferences", {}, ["fit no format", "prompt_completion"]),
        ("sft", "texts", {"data": {"format": "preference"}}, ["data.format='preference'", "prompt_completion"]),
        ("sft", "texts", {"data": {"format": "chat"}}, ["wants columns messages", "'text'"]),
        ("dpo", "preferences", {"dpo": {"label_smoothing": 0.5}}, ["dpo.label_smoothing", "0.5"]),
        ("dpo", "preferences", {"dpo": {"loss": "hinge"}}, ["dpo.loss", "'hinge'", "'sigmoid'"]),
        ("dpo", "labelled", {}, ["fit no format", "preference: chosen, rejected"]),
        ("dpo", "labelled", {"data": {"format": "labelled"}}, ["data.format='labelled'", "preference"]),
        ("dpo", "preferences", {"critic": {"name": "x"}}, ["unknown key 'critic'"]),
        ("reward_model", "texts", {}, ["fit no format", "preference", "labelled"]),
        ("reward_model", "labelled", {"data": {"format": "text"}}, ["data.format='text'", "preference", "labelled"]),
        ("reward_model", "probabilities", {}, ["label", "3.0", "1 for the class"]),
        ("reward_model", "labelled", {"training": {"iterations": None, "epochs": 1}, "data": {"streaming": True}},
         ["training.epochs", "data.streaming"]),
    ],
)  # fmt: skip
def test_what_is_refused(offline, tmp_path, task, file, changes, words):
    check(run("train", offline(task, file, **changes)), *words)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_policy_is_no_reward_model(offline, finish):
    done = finish(offline("reward_model", "labelled", training={"iterations": 1}))
    result = run("train", offline("sft", "texts", model={"name": str(done.run.final)}))
    check(result, str(done.run.final))

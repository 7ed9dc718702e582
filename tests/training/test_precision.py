"""Which dtypes a run computes in, float16 jobs with their loss scale, and what is refused."""

import dataclasses
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rapidfire_jax.algorithms.loss_scale import init_loss_scale
from rapidfire_jax.config import dump_config, load_config, with_dtypes
from rapidfire_jax.models.precision import hardware_dtype
from rapidfire_jax.training.interrupt import Interrupted
from rapidfire_jax.training.job import train
from rapidfire_jax.training.offline import OfflineJob
from rapidfire_jax.training.online import OnlineJob
from rapidfire_jax.training.run_directory import RunDirectory
from tests.training.test_bad_input import check, run
from tests.training.test_job import numbers
from tests.training.test_offline_jobs import data, offline  # noqa: F401
from tests.training.test_online_jobs import online  # noqa: F401

FULL = {"type": "none"}
EIGHT = {"name": "adamw_8bit"}


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("gpu", "7.0", "float16"),
        ("gpu", "7.5", "float16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),
        ("tpu", None, "bfloat16"),
    ],
)
def test_what_hardware_is_best_at(platform, capability, dtype):
    of_gpu = {} if capability is None else {"compute_capability": capability}
    assert hardware_dtype(SimpleNamespace(platform=platform, **of_gpu)) == dtype


@pytest.mark.parametrize(
    ("hardware", "adapter", "optimizer", "dtypes"),
    [
        ("float32", "lora", "adamw", ("float32", None)),
        ("float32", "none", "adamw", ("float32", None)),
        ("bfloat16", "lora", "adamw", ("bfloat16", None)),
        ("bfloat16", "none", "adamw", ("float32", "bfloat16")),
        ("bfloat16", "none", "adamw_8bit", ("bfloat16", None)),
        ("float16", "lora", "adamw_8bit", ("float16", None)),
        ("float16", "none", "adamw_8bit", ("float32", "float16")),
    ],
)
def test_dtypes_that_a_configuration_leaves_open(job, tmp_path, hardware, adapter, optimizer, dtypes):
    reward = [{"function": "tiny_rewards:letters"}, {"model": "some/model"}, {"model": "other", "dtype": "float16"}]
    config = load_config(
        job(adapter={"type": adapter}, optimizer={"name": optimizer}, reward=reward, critic={"name": "a/critic"})
    )
    filled = with_dtypes(config, hardware)
    for section in (filled.model, filled.critic):
        assert (section.dtype, section.compute_dtype) == dtypes
    assert [entry.dtype for entry in filled.reward] == [None, hardware, "float16"]
    (tmp_path / "filled.yaml").write_text(dump_config(filled), encoding="utf-8")
    assert load_config(tmp_path / "filled.yaml") == filled == with_dtypes(filled, "bfloat16")
    explicit = load_config(job(model={"dtype": "bfloat16", "compute_dtype": "float32"}))
    assert with_dtypes(explicit, hardware) == explicit


def test_the_command_line_writes_down_the_dtypes(offline, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("rapidfire_jax.models.precision.hardware_dtype", lambda: "bfloat16")
    monkeypatch.setattr("rapidfire_jax.training.job.train", lambda config, run: None)
    assert run("train", offline("sft", "texts", adapter=FULL)).exit_code == 0
    model = load_config(tmp_path / "run" / "config.yaml").model
    assert (model.dtype, model.compute_dtype) == ("float32", "bfloat16")


def check_steps(done, steps):
    """Some overflowed and the others were taken, by weights in float32."""
    state, skipped = done.job.state, [record["precision/skipped_steps"] for record in done.records]
    assert skipped == sorted(skipped) and 0 < skipped[-1] == int(state.loss_scale.skipped) < steps
    assert int(state.step) + skipped[-1] == steps
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((state.trainable, state.opt_state))}
    assert dtypes == {"float32", "int32"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trainable))


def test_sft_of_all_weights_in_float16(offline, finish):  # noqa: F811
    """The first scale is too large for so few tokens."""
    check_steps(finish(offline("sft", "completions", model={"compute_dtype": "float16"}, adapter=FULL)), 4)


@pytest.mark.slow
def test_ppo_on_float16_weights_and_its_resumption(online, finish, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("rapidfire_jax.training.models.init_loss_scale", lambda: init_loss_scale(2.0**24))
    rl, training = {"epochs": 2, "minibatches": 4}, {"iterations": 2, "checkpoint_every": 1}
    settings = {"model": {"dtype": "float16"}, "rl": rl, "training": training}
    done = finish(online("ppo", **settings))
    check_steps(done, 16)

    stopped = RunDirectory.create(load_config(online("ppo", **settings, run_dir=str(tmp_path / "stopped"))))
    iterate = OnlineJob.iterate

    def killed(self, iteration):
        if iteration == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(self, iteration)

    monkeypatch.setattr(OnlineJob, "iterate", killed)
    with pytest.raises(Interrupted):
        train(stopped.load_config(), stopped)
    monkeypatch.setattr(OnlineJob, "iterate", iterate)
    train(stopped.load_config(), stopped)
    assert numbers(stopped) == numbers(done.run)
    assert (stopped.final / "model.safetensors").read_bytes() == (done.run.final / "model.safetensors").read_bytes()


def test_float16_learns_what_float32_learns(offline):  # noqa: F811
    losses = {}
    for dtype in ("float32", "float16"):
        job = OfflineJob(load_config(offline("sft", "completions", model={"compute_dtype": dtype})))
        if dtype == "float16":
            job.state = dataclasses.replace(job.state, loss_scale=init_loss_scale(256.0))
        losses[dtype] = [job.iterate(i)["loss/total"] for i in range(4)]
    np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=5e-3)


def test_a_run_that_overflows_at_every_scale_ends(offline):  # noqa: F811
    config = load_config(offline("sft", "completions", model={"compute_dtype": "float16"}, training={"iterations": 9}))
    directory = RunDirectory.create(config)

    def broken(config):
        job = OfflineJob(config)
        nan = jax.tree.map(lambda x: x * np.float32(np.nan), job.state.trainable)
        job.state = dataclasses.replace(job.state, trainable=nan, loss_scale=init_loss_scale(8.0))
        return job

    with pytest.raises(FloatingPointError, match=r"every step of iteration 4 overflows in float16.*compute_dtype"):
        train(config, directory, broken)
    records = [record for record in directory.read(directory.metrics) if "phase" not in record]
    assert [record["precision/loss_scale"] for record in records] == [8, 4, 2]
    assert all("loss/total" not in record and np.isfinite(list(record.values())).all() for record in records)


def test_no_loss_scale_without_float16(offline, assets):  # noqa: F811
    for model in ({}, {"dtype": "bfloat16"}, {"dtype": "float16", "compute_dtype": "float32"}):
        assert OfflineJob(load_config(offline("sft", "completions", model=model))).state.loss_scale is None


def test_bfloat16_weights_rounded_to_nearest(offline, capsys):  # noqa: F811
    optimizer = EIGHT | {"stochastic_rounding": False, "learning_rate": 1e-5}
    settings = {"model": {"dtype": "bfloat16"}, "adapter": FULL, "optimizer": optimizer}
    job = OfflineJob(load_config(offline("sft", "completions", **settings)))
    before = np.concatenate([np.float32(x).ravel() for x in jax.tree.leaves(job.state.trainable)])
    job.iterate(0)
    moved = np.concatenate([np.float32(x).ravel() for x in jax.tree.leaves(job.state.trainable)]) != before
    # Of weights from 0.01 on, the last bit is 6e-5 and more: none can make a step of 1e-5.
    assert moved.any() and not moved[abs(before) > 0.01].any()
    assert not capsys.readouterr().err


def test_says_once_that_steps_round_away(offline, capsys):  # noqa: F811
    OfflineJob(load_config(offline("sft", "completions", model={"dtype": "bfloat16"}, adapter=FULL)))
    assert capsys.readouterr().err.count("adamw rounds bfloat16 weights to nearest") == 1
    OfflineJob(load_config(offline("sft", "completions", model={"dtype": "bfloat16"})))  # adapters are float32
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"dtype": "float16"}, "adapter": FULL}, ["model.dtype=float16", "compute_dtype=float16", "lora"]),
        ({"critic": {"name": "x", "dtype": "float16"}, "adapter": FULL}, ["critic.dtype=float16", "compute_dtype"]),
        ({"model": {"dtype": "auto"}}, ["model.dtype", "'bfloat16'", "'auto'"]),
        ({"optimizer": {"stochastic_rounding": True}}, ["optimizer: stochastic_rounding=true", "adamw_8bit"]),
        ({"optimizer": EIGHT | {"stochastic_rounding": True}}, ["stochastic_rounding=true", "model.dtype=bfloat16"]),
        ({"optimizer": EIGHT | {"stochastic_rounding": False}, "adapter": FULL}, ["stochastic_rounding=false", "null"]),
        ({"critic": {"optimizer": EIGHT | {"stochastic_rounding": True}}, "model": {"dtype": "bfloat16"},
          "adapter": FULL, "optimizer": EIGHT}, ["stochastic_rounding=true"]),
    ],
)  # fmt: skip
def test_what_is_refused(online, tmp_path, changes, words):  # noqa: F811
    check(run("train", online("ppo", **changes)), *words)
    assert not (tmp_path / "run" / "config.yaml").exists()

"""Configs: from a file, a heuristic or the tuner."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hopper, tuning
from pallas_kernels.tuning import choice, config_for


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = choice(1, 2, 4, 8, 16)
    stages: int = choice(2, 3, 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty place for measured Configs, and an H100 to look them up for."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._tuned.cache_clear()
    with jax.sharding.use_abstract_mesh(hopper.abstract_mesh()):
        yield tmp_path / "nvidia_h100_80gb_hbm3"
    tuning._tuned.cache_clear()


def kernel(x):
    """The Config that it would run with."""
    config = config_for("kernel", Config(rows=2, stages=2), n=x.size, dtype=x.dtype)
    if config.rows * config.stages > 48:
        raise ValueError("does not fit")
    return config


def prepare(function, args):
    return function(*args)


def test_the_tuner_finds_the_best_and_later_calls_use_it(folder):
    x = jnp.zeros(8)

    def measure(config, args):
        return abs(config.rows - 8) + 10 * abs(config.stages - 3) + 1.0

    assert tuning.tune(kernel, x, prepare=prepare, measure=measure) == {"kernel": Config(8, 3)}
    assert json.loads((folder / "kernel.json").read_text()) == {"dtype=float32, n=8": {"rows": 8, "stages": 3}}
    assert kernel(x) == Config(8, 3)
    assert kernel(jnp.zeros(9)) == Config(2, 2)


def test_what_does_not_fit_is_passed_over(folder):
    def measure(config, args):
        if config == Config(16, 2):
            raise jax.errors.JaxRuntimeError("does not launch")
        return 1.0 / (config.rows * config.stages)

    tuning.tune(kernel, jnp.zeros(8), prepare=prepare, measure=measure)
    assert kernel(jnp.zeros(8)) in (Config(16, 3), Config(8, 4))  # none of their alternatives is better and fits


def test_a_trial_prescribes_and_tells_what_was_asked(folder):
    with tuning.trial(kernel=Config(16, 2)) as asked:
        assert kernel(jnp.zeros(8)) == Config(16, 2)
    assert asked == {"kernel": ("dtype=float32, n=8", Config(16, 2))}
    assert kernel(jnp.zeros(8)) == Config(2, 2)


def test_alternatives_differ_in_one_field_by_one_step():
    assert set(tuning.alternatives(Config(1, 3))) == {Config(2, 3), Config(1, 2), Config(1, 4)}


def test_the_command_says_what_it_needs(monkeypatch):
    with pytest.raises(SystemExit, match="need a Hopper GPU"):
        tuning.main([])
    monkeypatch.setattr(hopper, "why_not_hopper", list)
    with pytest.raises(SystemExit, match=r"no operation softmax; accepted: .*rms_norm"):
        tuning.main(["softmax"])

"""Every configuration that the project ships loads, says how to run it, and every task has one."""

from pathlib import Path

import pytest
import yaml

from rapidfire_jax.algorithms import tasks
from rapidfire_jax.config import dump_config, load_config, parse_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configuration(path):
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert f"uv run rapidfire train {path.relative_to(ROOT)}\n" in header


def test_every_task_has_a_configuration():
    assert {load_config(path).task for path in CONFIGS} == set(tasks())


def test_settings_of_a_task_are_those_of_its_dataclasses():
    path = ROOT / "configs" / "grpo.yaml"
    config = load_config(path, ["rl.scale=none", "rl.clip_range_high=0.28"])
    assert (config.settings.scale, config.settings.clip_range_high) == ("none", 0.28)
    assert not hasattr(config.settings, "temperature")  # stands in rollout

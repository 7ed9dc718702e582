"""Jobs of the tasks that learn from their own rollouts: what their settings do, resuming, and what they refuse."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

from rapidfire_jax.config import load_config
from rapidfire_jax.models.auto import FlaxAutoModelForCausalLM
from rapidfire_jax.training.job import train
from rapidfire_jax.training.online import OnlineJob
from rapidfire_jax.training.run_directory import RunDirectory
from tests.training.test_bad_input import check, run
from tests.training.test_job import numbers

TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10)
ONE_STEP = {"epochs": 1, "minibatches": 1}


@pytest.fixture
def online(job):
    """`job` of a task with prompts of one bucket and one optimiser step an iteration, `changes` merged in."""

    def write(task, **changes):
        tree = {
            "adapter": {"rank": 2, "layers": 1, "targets": ["q_proj", "down_proj"]},
            "reward": {"function": "tiny_rewards:characters"},
            "data": {"prompt_tokens": [3, 6], "max_prompt_length": 8},
            "training": {"iterations": 3, "checkpoint_every": 2, "eval_prompts": 8},
            "logging": {"tensorboard": False},
        } | {"rl": ONE_STEP | changes.pop("rl", {})}
        for section, values in changes.items():
            tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
        return job(task=task, **tree)

    return write


def assert_exported(done):
    """`final` holds the trained policy, which is not the one that it started from."""
    policy, state = done.job.policy, done.job.state
    ours = policy.merge(state.frozen, state.trainable)(TOKENS)
    exported = FlaxAutoModelForCausalLM.from_pretrained(str(done.run.final))(TOKENS)
    np.testing.assert_allclose(exported, ours, rtol=1e-4, atol=1e-4)
    start = FlaxAutoModelForCausalLM.from_pretrained(done.job.config.model.name)(TOKENS)
    assert np.abs(np.asarray(start - ours)).max() > 1e-3


def changed(before, after):
    """Which arrays of two trees differ."""
    return jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), before, after)


def test_quantised_weights_integer_products_a_cache_of_8_bits_and_a_small_decode_batch(online, finish):
    changes = {"cache": "int8", "activations": "int8", "decode_batch_size": 3}
    done = finish(online("ppo", model={"quantize": "int8", "quantize_vocabulary": "int8"}, rollout=changes))
    assert_exported(done)
    assert all(0 < record["policy/rollout_mismatch"] < 0.2 for record in done.records)


def test_ppo_with_a_judge_running_statistics_and_an_optimizer_of_the_critic(online, finish):
    settings = {
        "rl": {"reward_normalization": "running", "kl_target": 1.0, "kl_horizon": 8.0},
        "judge": {"function": "tiny_rewards:plain"},
        "critic": {"optimizer": {"learning_rate": 0.05, "max_grad_norm": None}},
    }
    done = finish(online("ppo", **settings))
    assert_exported(done)
    stats, rewards = done.job.state.stats, [r["reward"] for r in done.records]
    assert (float(stats.score_count), float(stats.score_mean)) == pytest.approx((24, np.mean(rewards)), abs=1e-5)
    coefficients = [r["objective/kl_coef"] for r in done.records]
    assert coefficients[0] == pytest.approx(0.05) and coefficients[1] == pytest.approx(0.05 * 0.8)  # KL was 0

    samples = [json.loads(line) for line in done.run.samples.read_text().splitlines()]
    for sample in samples:
        text = sample["response"]
        assert sample["reward"] == pytest.approx(len(text) / 10, abs=1e-6)
        assert sample["judge"] == pytest.approx(sum(c.isascii() for c in text) / (1 + len(text)), abs=1e-6)
    for name, share in done.summary["win_rate"].items():
        pairs = [(a[name], b[name]) for a, b in zip(samples[:8], samples[8:], strict=True)]
        assert share == np.mean([float(b > a) + 0.5 * (b == a) for a, b in pairs])
    assert set(done.summary["win_rate"]) == {"reward", "judge"}

    # The same programs with the rate of one of the two optimisers at 0.
    for frozen, critic_rate, policy_rate in (("critic", 0.0, 0.01), ("policy", 0.05, 0.0)):
        rates = settings | {
            "critic": {"optimizer": {"learning_rate": critic_rate, "max_grad_norm": None}},
            "optimizer": {"learning_rate": policy_rate},
        }
        ours = OnlineJob(load_config(online("ppo", **rates)))
        before = jax.tree.map(np.array, ours.state.trainable)
        for i in range(2):  # the second factor of an adapter starts at 0, so that the first has no gradient at first
            ours.iterate(i)
        moved = changed(before, ours.state.trainable)
        is_critic = ours.policy.is_critic(ours.state.trainable)
        assert jax.tree.leaves(moved) == [c == (frozen == "policy") for c in jax.tree.leaves(is_critic)]


def test_packed_rollouts_teach_the_same(online, finish):
    apart, together = (finish(online("ppo", rl={"packing": packing})) for packing in (False, True))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(close, together.job.state.trainable, apart.job.state.trainable)


def test_ppo_compatible_with_trl(online, finish):
    done = finish(
        online("ppo", rl={"compat": "trl", "whiten_groups": 2, "micro_batches": 2}, optimizer={"max_grad_norm": None})
    )
    assert_exported(done)
    first = done.records[0]
    assert first["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["objective/scores"] == pytest.approx(first["reward"], abs=1e-6)
    assert first["objective/rlhf_reward"] == pytest.approx(first["reward"], abs=1e-4)  # no KL yet
    assert {"policy/approxkl_avg", "policy/clipfrac_avg", "loss/value_avg", "val/num_eos_tokens"} <= first.keys()


def test_ppo_with_token_rewards_bootstrapping_importance_and_kl_in_the_loss(online, finish):
    rl = {"bootstrap_truncated": True, "importance_cap": 0.5, "kl_in": "loss", "kl_estimator": "k3", "micro_batches": 4}
    reward = [
        {"function": "tiny_rewards:even", "weight": 0.5, "name": "even"},
        {"function": "tiny_rewards:plain", "weight": 2.0},
    ]
    done = finish(online("ppo", rl=rl, reward=reward))
    assert_exported(done)
    for record in done.records:
        assert record["policy/importance"] == pytest.approx(0.5, abs=1e-5)  # the ratio itself is 1
        assert record["reward"] == pytest.approx(0.5 * record["reward/even"] + 2 * record["reward/plain"], abs=1e-5)
        assert record["objective/shaped_reward"] == pytest.approx(record["reward"], abs=1e-5)  # without the KL
        assert record["policy/rollout_mismatch"] < 1e-4
    assert done.records[-1]["loss/kl"] > 0


def test_grpo_with_dynamic_sampling_and_its_resumption(online, finish, tmp_path, monkeypatch):
    rl = {"group_size": 2, "dynamic_sampling": True, "max_sampling_rounds": 6, "reward_normalization": "reference"}
    settings = {"rl": rl, "reward": {"function": "tiny_rewards:brief_until"}, "training": {"iterations": 4}}
    done = finish(online("grpo", **settings))
    assert_exported(done)
    rounds = [int(r["objective/sampling_rounds"]) for r in done.records]
    assert len(set(rounds)) > 1 and max(rounds) <= 6 and done.job.taken == sum(rounds)
    for record in done.records:
        assert record["objective/informative"] == 1.0 or record["objective/sampling_rounds"] == 6
        assert record["reward"] == 0.5 or record["objective/sampling_rounds"] == 6
    assert float(done.job.state.stats.score_count) == 8  # the first iteration's

    # A reward that fails in the last rollout of the second iteration; calls before: a trial, and an evaluation.
    stopped = RunDirectory.create(load_config(online("grpo", **settings, run_dir=str(tmp_path / "stopped"))))
    rewards = importlib.import_module("tiny_rewards")
    with monkeypatch.context() as patch:
        patch.setattr(rewards, "SCORED", 0)
        patch.setattr(rewards, "BREAK_AT", 2 + sum(rounds[:2]))
        with pytest.raises(ValueError, match="out of quota"):
            train(stopped.load_config(), stopped)
    assert [p.name for p in stopped.checkpoints.iterdir()] == ["1"]
    train(stopped.load_config(), stopped)
    assert numbers(stopped) == numbers(done.run)
    for file in ("samples.jsonl", "final/model.safetensors", "final/adapter/adapter_model.safetensors"):
        assert (stopped.path / file).read_bytes() == (done.run.path / file).read_bytes()


def test_rloo(online, finish):
    done = finish(online("rloo", rl={"group_size": 4, "reward_normalization": "reference", "micro_batches": 2}))
    assert_exported(done)
    stats, first = done.job.state.stats, done.records[0]
    assert (float(stats.score_count), float(stats.score_mean)) == pytest.approx((8, first["reward"]), abs=1e-5)
    assert first["objective/shaped_reward"] == pytest.approx(0.0, abs=1e-4)
    assert done.job.taken == 3  # batches of two prompts


def test_reinforce_pp(online, finish):
    rl = {"group_size": 2, "kl_in": "loss", "kl_estimator": "k2", "reward_clip": 0.65, "missing_eos_penalty": 0.25}
    done = finish(online("reinforce_pp", rl=rl, memory={"remat": "full"}, rollout={"log_probs": "reuse"}))
    assert_exported(done)
    for record in done.records:
        penalty = 0.25 * (1 - record["ended"])
        # Each score is clipped, and some are below: their mean is less than the clipped mean. None is below 0.5.
        assert 0.5 - penalty < record["objective/shaped_reward"] < min(record["reward"], 0.65) - penalty
    assert done.records[-1]["loss/kl"] > 0


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("gpro", {}, ["'gpro'", "did you mean 'grpo'"]),
        ("grpo", {"rl": {"lam": 0.9}}, ["unknown key 'rl.lam'"]),
        ("rloo", {"rl": {"whiten_advantages": True}}, ["unknown key 'rl.whiten_advantages'"]),
        ("ppo", {"rl": {"group_size": 4}}, ["unknown key 'rl.group_size'"]),
        ("grpo", {"rl": {"group_size": 3}}, ["rollout.batch_size=8", "rl.group_size=3"]),
        ("reinforce_pp", {"rl": {"group_size": 5}}, ["rollout.batch_size=8", "rl.group_size=5"]),
        ("grpo", {"rl": {"group_size": 1}}, ["rl.group_size", "greater than or equal to 2"]),
        ("grpo", {"rl": {"scale": "max"}}, ["rl.scale", "'std'", "'max'"]),
        ("grpo", {"rl": {"micro_batches": 3}}, ["rl.micro_batches=3"]),
        ("grpo", {"rl": {"packing": True}}, ["rl.packing=true", "aggregation=token", "sequence"]),
        ("grpo", {"critic": {"name": "some/model"}}, ["critic: grpo has none"]),
        ("rloo", {"critic": {"optimizer": {"learning_rate": 0.1}}}, ["critic: rloo has none"]),
        ("ppo", {"rl": {"compat": "trl"}}, ["rl.compat=trl", "optimizer.max_grad_norm=null"]),
        ("ppo", {"rl": {"compat": "trl", "kl_in": "loss"}}, ["rl.compat=trl", "kl_in=loss", "reward"]),
        ("ppo", {"rl": {"compat": "trl", "kl_estimator": "k2"}}, ["kl_estimator=k2", "k1, k3"]),
        ("ppo", {"rl": {"compat": "trl", "value_clip_range": None}}, ["rl.value_clip_range"]),
        ("ppo", {"rl": {"compat": "trl", "bootstrap_truncated": True}}, ["bootstrap_truncated=True"]),
        ("ppo", {"rl": {"whiten_groups": 2}}, ["rl.whiten_groups=2", "rl.compat"]),
        ("ppo", {"rl": {"compat": "trl", "whiten_groups": 3}, "optimizer": {"max_grad_norm": None}},
         ["rl.whiten_groups=3", "rollout.batch_size=8"]),
        ("ppo", {"rl": {"importance_cap": 2.0}, "rollout": {"log_probs": "reuse"}}, ["rl.importance_cap", "recompute"]),
        ("ppo", {"rl": {"bootstrap_truncated": True}, "rollout": {"log_probs": "reuse"}},
         ["rl.bootstrap_truncated", "recompute"]),
        ("ppo", {"rl": {"kl_estimator": "k4"}}, ["rl.kl_estimator", "'k1'", "'k4'"]),
        ("ppo", {"rl": {"dual_clip": 0.5}}, ["rl.dual_clip", "0.5"]),
        ("ppo", {"training": {"epochs": 2}}, ["unknown key 'training.epochs'"]),
        ("ppo", {"training": {"eval_examples": 2}}, ["training.eval_examples", "eval_prompts"]),
        ("ppo", {"sft": {"packing": True}}, ["unknown key 'sft'"]),
        (
            "ppo",
            {"model": {"quantize_vocabulary": "int8"}, "adapter": {"type": "none"}},
            ["model.quantize_vocabulary=int8: quantised weights are frozen; use adapter.type=lora"],
        ),
        (
            "ppo",
            {"critic": {"name": "x", "quantize": "nf4"}, "adapter": {"type": "none"}},
            ["critic.quantize=nf4: quantised weights are frozen"],
        ),
        ("ppo", {"data": {"format": "labelled"}}, ["data.format='labelled'", "prompt"]),
        ("ppo", {"data": {"max_length": 64}}, ["data.max_length=64", "data.max_prompt_length"]),
        ("ppo", {"data": {"too_long": "truncate"}}, ["data.too_long=truncate", "data.prompt_tokens"]),
        ("ppo", {"reward": []}, ["reward", "at least one"]),
        ("ppo", {"judge": {"function": "tiny_rewards:nan"}}, ["tiny_rewards:nan", "nan"]),
        ("ppo", {"judge": {"function": "tiny_rewards:leters"}}, ["leters", "letters"]),
        ("ppo", {"critic": {"nam": "x"}}, ["critic.nam", "did you mean 'name'"]),
    ],
)  # fmt: skip
def test_what_is_refused(online, tmp_path, task, changes, words):
    check(run("train", online(task, **changes)), *words)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_language_model_is_no_critic(online, assets):
    check(run("train", online("ppo", critic={"name": str(assets / "model")})), str(assets / "model"))


@pytest.mark.parametrize("layers", [None, 1])
def test_the_reference_is_asked_before_a_reward_on_the_host_unless_it_shares_work(online, layers, monkeypatch):
    job = OnlineJob(load_config(online("ppo", adapter={"layers": layers})))
    order, programs, reward = [], job.programs, job.reward

    def noting(name, function):
        def called(*args):
            order.append(name)
            return function(*args)

        return called

    names = ("rollout", "reference", "learn")
    noted = {name: noting(name, getattr(programs, name)) for name in names}
    monkeypatch.setattr(job, "programs", dataclasses.replace(programs, **noted))
    monkeypatch.setattr(job, "reward", noting("reward", reward))
    first = job.iterate(0)
    expected = ["rollout", "reference", "reward", "learn"] if layers is None else ["rollout", "reward", "learn"]
    assert order == expected
    assert np.isfinite(first["kl"])


def test_a_group_shares_the_prefill_of_its_prompt(online, finish):
    done = finish(online("grpo", rollout={"batch_size": 8}, rl={"group_size": 4}))
    assert_exported(done)
    assert done.job.programs.rollout is not done.job.programs.sample
    assert all(0 <= record["kl"] < 1 for record in done.records)

"""`compat="trl"` against what TRL 1.12.0's own PPOTrainer computed; the script is tests/golden/trl/make.py."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rapidfire_jax import (
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForSequenceClassification,
    PPOBatch,
    PPOConfig,
    PPOHParams,
    Rollouts,
    init_state,
    kl_estimate,
    make_optimizer,
    make_policy,
    ppo_learn,
    ppo_loss,
    ppo_targets,
    save_pretrained,
)
from rapidfire_jax.algorithms import trl_parity

FOLDER = Path(__file__).parents[1] / "golden" / "trl"


@functools.cache
def cases() -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FOLDER / "cases.npz") as file:
        for key in file.files:
            name, _, field = key.partition("/")
            found.setdefault(name, {})[field] = file[key]
    return found


def settings(case) -> tuple[PPOHParams, PPOConfig]:
    penalty = float(case["missing_eos_penalty"])
    names = {
        "kl_coef": "kl_coef", "gamma": "gamma", "lam": "lam", "clip_range": "cliprange",
        "value_clip_range": "cliprange_value", "value_coef": "vf_coef",
    }  # fmt: skip
    hparams = PPOHParams(
        **{ours: float(case[theirs]) for ours, theirs in names.items()},
        missing_eos_penalty=0.0 if np.isnan(penalty) else penalty,
    )
    estimator = "k3" if case["kl_estimator"] else "k1"
    config = PPOConfig(
        compat="trl", kl_estimator=estimator, whiten_rewards=bool(case["whiten_rewards"]), eos_id=int(case["eos_id"])
    )
    return hparams, config


def rollouts_of(case, dtype) -> Rollouts:
    """As a rollout hands them on: nothing masked or filled yet."""
    cast = lambda name: jnp.asarray(case[name], dtype)  # noqa: E731
    width = case["responses"].shape[1]
    tokens = jnp.asarray(case["query_responses"])
    return Rollouts(
        tokens=tokens,
        attention_mask=tokens != int(case["pad_id"]),
        mask_t=jnp.asarray(np.arange(width) <= case["sequence_lengths"][:, None]),
        ended=jnp.asarray(case["contain_eos"]),
        old_logp_t=cast("logprobs_raw"),
        old_v_t=cast("values_raw"),
        ref_logp_t=cast("ref_logprobs_raw"),
        score=cast("scores_raw"),
    )


def check(case, name, ours, tolerance, *, summands=0.0):
    """To `tolerance` of the largest value of an array, or of the summands of a number that cancel."""
    theirs = np.asarray(case[name], np.float64)
    largest = max(float(np.abs(theirs).max(initial=0.0)), summands, 1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest, err_msg=name)


def test_there_are_enough_cases():
    assert len(cases()) >= 40


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", cases())
def test_update_of_trl(name, dtype):
    case = cases()[name]
    with jax.enable_x64(dtype == "float64"):
        compare(case, jnp.dtype(dtype), {"float64": 1e-10, "float32": 1e-5}[dtype])


def compare(case, dtype, tolerance):
    hparams, config = settings(case)
    rollouts = rollouts_of(case, dtype)
    targets, metrics = trl_parity.targets(rollouts, hparams, config)
    batch, same = ppo_targets(rollouts, rollouts.tokens, hparams, config)
    np.testing.assert_array_equal(batch.adv_t, targets.adv_t)
    assert same.keys() == metrics.keys()

    np.testing.assert_array_equal(batch.mask_t, ~case["padding_mask"])
    np.testing.assert_array_equal(targets.value_mask_t, ~case["padding_mask_p1"])
    check(case, "logprobs", targets.old_logp_t, tolerance)
    check(case, "ref_logprobs", targets.ref_logp_t, tolerance)
    check(case, "values", batch.old_v_t, tolerance)
    kl_t = kl_estimate(targets.old_logp_t, targets.ref_logp_t, config.kl_estimator)
    check(case, "kl", kl_t, tolerance)
    check(case, "non_score_reward", -hparams.kl_coef * kl_t, tolerance)
    check(case, "rewards", targets.r_t, tolerance)
    check(case, "advantages", batch.adv_t, tolerance)
    check(case, "returns", batch.return_t, tolerance)
    kl_size = float(np.abs(case["kl"]).sum(axis=1).mean())
    for metric in metrics:
        if f"metrics/{metric}" in case:
            summands = {"objective/kl": kl_size, "objective/non_score_reward": hparams.kl_coef * kl_size}
            check(case, f"metrics/{metric}", metrics[metric], tolerance, summands=summands.get(metric, 0.0))

    # Whitening subtracts a mean: rounding of advantages that are large beside their spread is what is left over.
    raw = case["advantages_unwhitened"][~case["padding_mask"]]
    tolerance = max(tolerance, 4 * float(jnp.finfo(dtype).eps) * abs(raw.mean()) / raw.std())

    statistics = np.zeros(
        (7, int(case["num_ppo_epochs"]), int(case["num_mini_batches"]), int(case["gradient_accumulation_steps"]))
    )
    names = {
        "loss/policy_avg": "pg_loss", "loss/value_avg": "vf_loss", "policy/approxkl_avg": "approxkl",
        "policy/clipfrac_avg": "pg_clipfrac", "val/clipfrac_avg": "vf_clipfrac", "policy/entropy_avg": "entropy",
        "val/ratio": "ratio",
    }  # fmt: skip
    steps = [key.removesuffix("/inds") for key in case if key.endswith("/inds")]
    assert steps
    for step in steps:
        rows = case[f"{step}/inds"]
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        arrays = [jnp.asarray(case[f"{step}/{x}"], dtype) for x in ("new_logprobs_raw", "entropy_t", "vpred_raw")]
        loss = lambda *arrays, part=part: ppo_loss(*arrays, part, hparams, config)  # noqa: E731
        total, count, found = loss(*arrays)
        assert count == 1
        # Whitened advantages sum to 0, and so does the policy loss before the first step.
        size = float(np.abs(case["advantages"]).max())
        check(case, f"{step}/loss", total, tolerance, summands=size)
        gradients = jax.grad(lambda *arrays, loss=loss: loss(*arrays)[0], argnums=(0, 2))(*arrays)
        check(case, f"{step}/grad_new_logprobs", gradients[0], tolerance)
        check(case, f"{step}/grad_vpred", gradients[1], tolerance)
        for i, (ours, theirs) in enumerate(names.items()):
            # TRL holds the clip fractions in float32.
            least = 1e-7 if "clipfrac" in ours else 0.0
            summands = size if ours == "loss/policy_avg" else 0.0
            check(case, f"{step}/{theirs}", found[ours], max(tolerance, least), summands=summands)
            statistics[(i, *case[f"{step}/index"])] = found[ours]
    means = dict(zip(names, statistics.reshape(7, -1).mean(axis=1), strict=True))
    for metric, value in means.items():
        least = 1e-7 if "clipfrac" in metric else 0.0
        summands = size if metric == "loss/policy_avg" else 0.0
        check(case, f"metrics/{metric}", value, max(tolerance, least), summands=summands)
    variance = statistics[6].reshape(-1).var(ddof=1)
    check(case, "metrics/val/ratio_var", variance, tolerance, summands=1.0)


@functools.cache
def iteration():
    with np.load(FOLDER / "iteration" / "iteration.npz") as file:
        return {key: file[key] for key in file.files}


def test_whole_iteration_of_trl(tmp_path):
    """Four epochs of Adam on two models: every parameter afterwards is TRL's to 1e-5."""
    case = iteration()
    model = FlaxAutoModelForCausalLM.from_pretrained(str(FOLDER / "iteration" / "policy"))
    critic = FlaxAutoModelForSequenceClassification.from_pretrained(str(FOLDER / "iteration" / "value"))
    scorer = FlaxAutoModelForSequenceClassification.from_pretrained(str(FOLDER / "iteration" / "reward"))
    policy, frozen, trainable = make_policy(model, jax.random.key(0), lora=None, critic=critic)
    hparams, config = settings(case)
    numbers = {name: float(case[name]) for name in ("learning_rate", "temperature")}
    hparams = dataclasses.replace(hparams, **numbers)
    config = dataclasses.replace(config, epochs=int(case["num_ppo_epochs"]), recompute=True)
    optimizer = make_optimizer("adamw")
    state = init_state(frozen, trainable, optimizer)

    rollouts = rollouts_of(case, jnp.float32)
    scored = jnp.concatenate([case["queries"], case["postprocessed_responses"]], axis=1)
    score = scorer(jnp.where(scored == int(case["pad_id"]), 0, scored), scored != int(case["pad_id"]))
    check(case, "scores_raw", score, 1e-5)
    tokens = jnp.where(rollouts.attention_mask, rollouts.tokens, 0)
    model_of = {"apply": policy.apply, "reference": policy.reference, "encode": policy.encode}
    learn = jax.jit(functools.partial(ppo_learn, **model_of, optimizer=optimizer, config=config))
    rollouts = dataclasses.replace(rollouts, tokens=tokens, score=score, old_v_t=None, ref_logp_t=None)
    state, metrics = learn(state, rollouts, jax.tree.map(jnp.float32, hparams), jax.random.key(1))

    for name, value in metrics.items():
        if f"metrics/{name}" in case and name != "policy/entropy_avg":  # fillers differ, and nothing else sees them
            check(case, f"metrics/{name}", value, 1e-4)  # squares of differences after several steps in float32
    save_pretrained(policy.merge(state.frozen, state.trainable), tmp_path / "policy")
    save_pretrained(policy.merge_critic(state.frozen, state.trainable), tmp_path / "value")
    for which in ("policy", "value"):
        before = load_file(FOLDER / "iteration" / which / "model.safetensors")
        theirs = load_file(FOLDER / "iteration" / f"{which}_after.safetensors")
        ours = load_file(tmp_path / which / "model.safetensors")
        assert max(np.abs(theirs[name] - before[name]).max() for name in before) > 1e-3
        for name, weight in theirs.items():
            np.testing.assert_allclose(ours[name], weight, rtol=0, atol=1e-5, err_msg=f"{which} {name}")


def test_the_default_preset_does_otherwise():
    """Where the traps are, the two presets part; without them they agree."""
    case = cases()["defaults"]
    hparams, config = settings(case)
    rollouts = rollouts_of(case, jnp.float32)
    theirs, _ = ppo_targets(rollouts, rollouts.tokens, hparams, config)
    ours, _ = ppo_targets(rollouts, rollouts.tokens, hparams, PPOConfig())
    assert np.abs(np.asarray(ours.return_t - theirs.return_t)).max() > 1e-3
    full = dataclasses.replace(rollouts, mask_t=jnp.ones_like(rollouts.mask_t))
    theirs, _ = ppo_targets(full, full.tokens, hparams, config)
    ours, _ = ppo_targets(full, full.tokens, hparams, PPOConfig())
    np.testing.assert_allclose(ours.return_t, theirs.return_t, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.adv_t, theirs.adv_t, rtol=1e-5, atol=1e-5)


def test_batches_hold_no_more_than_a_step_needs():
    case = cases()["defaults"]
    hparams, config = settings(case)
    batch, _ = ppo_targets(rollouts_of(case, jnp.float32), None, hparams, config)
    assert isinstance(batch, PPOBatch) and batch.ref_logp_t is None

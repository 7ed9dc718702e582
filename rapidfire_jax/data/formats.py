"""Which columns of a record mean what, and prompts and completions out of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfire_jax.config.data import DEFAULT_COLUMN, DataConfig, Format, Role
from rapidfire_jax.data.records import Record, check_columns, clean
from rapidfire_jax.data.splits import fraction
from rapidfire_jax.errors import InputError

Message = dict[str, Any]
Side = str | list[Message]

NEEDS: dict[Format, tuple[tuple[Role, ...], ...]] = {  # any one of these sets of roles will do
    "prompt": (("prompt",),),
    "text": (("text",),),
    "prompt_completion": (("prompt", "completion"),),
    "chat": (("messages",),),
    "preference": (("chosen", "rejected"),),
    "labelled": (("text", "label"), ("prompt", "completion", "label"), ("messages", "label")),
}
MAY_HAVE: dict[Format, tuple[Role, ...]] = {"preference": ("prompt", "margin")}


class Unusable(InputError):
    """A record of the right shape that nothing can be learnt from; `data.unusable: drop` leaves it out."""


@dataclass(frozen=True)
class Layout:
    """The format of a source and the columns of the roles it uses."""

    source: str
    format: Format
    columns: dict[Role, str]

    def at(self, row: int, role: Role) -> str:
        """The beginning of a message about one value."""
        return f"{self.source}: row {row}: column {self.columns[role]!r}"

    def value(self, record: Record, role: Role) -> Any:
        """What a record holds for a role; None for a role that the source does not have."""
        return record.get(self.columns[role]) if role in self.columns else None

    def side(self, row: int, record: Record, role: Role) -> Side:
        """A text, or a list of messages checked one by one.

        Raises:
          InputError: neither of them.
        """
        value = self.value(record, role)
        if isinstance(value, str):
            if not _is_text(value):
                raise InputError(f"{self.at(row, role)} holds half a surrogate pair, which is no character")
            return value
        place = self.at(row, role)
        if value is None:
            raise InputError(f"{place} has no value")
        if not isinstance(value, list | tuple):
            raise InputError(f"{place} is {value!r:.100}; give text, or a list of {{role, content}} messages")
        if not value:
            raise InputError(f"{place} is an empty list of messages")
        return [_message(f"{place}: message {i}", message) for i, message in enumerate(value)]

    def number(self, row: int, record: Record, role: Role) -> float:
        """A finite number, from a number, true or false, or text of one.

        Raises:
          Unusable: anything else.
        """
        value = self.value(record, role)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not abs(number) < float("inf"):
            raise Unusable(f"{self.at(row, role)} is {value!r:.100}; give a finite number")
        return number

    def place(self, row: int, record: Record, key: str) -> float:
        """Where on the line [0, 1) of `data.train` and `data.held_out` a record lies.

        Its column `split_place` says so, or else the hash of `key`.

        Raises:
          InputError: `split_place` holds something else.
        """
        if "split_place" not in self.columns:
            return fraction(key)
        value = self.value(record, "split_place")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise InputError(f"{self.at(row, 'split_place')} is {value!r:.100}; give a number from 0 to below 1")
        return float(value)


@dataclass(frozen=True)
class Plain:
    """Two texts, the second going on where the first ends."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages, of which those from number `start` on are the completion; message `start` is the assistant's."""

    messages: list[Message]
    start: int


Exchange = Plain | Conversation


def key(exchange: Exchange) -> str:
    """The text whose hash says where an exchange belongs: its prompt, or without one all that is said."""
    if isinstance(exchange, Plain):
        return exchange.prompt if exchange.prompt.strip() else exchange.completion
    prompt = said(exchange.messages[: exchange.start])
    return prompt if prompt.strip() else said(exchange.messages)


def cleaned(exchange: Exchange, place: str) -> Exchange:
    """Texts with `<br />` tags and white space as single spaces, the space between them kept; messages as they are.

    Raises:
      Unusable: nothing is left of the completion.
    """
    if not isinstance(exchange, Plain):
        return exchange
    prompt, whole = clean(exchange.prompt), clean(f"{exchange.prompt}{exchange.completion}")
    if whole == prompt:
        raise Unusable(f"{place}: the completion is empty once it is cleaned")
    return (
        Plain(prompt, whole.removeprefix(prompt))
        if whole.startswith(prompt)
        else Plain(prompt, clean(exchange.completion))
    )


def said(messages: Iterable[Message]) -> str:
    """The contents of messages, one below the other."""
    return "\n".join(message["content"] or "" for message in messages)


def detect(config: DataConfig, source: str, found: Iterable[str], accepted: Sequence[Format]) -> Layout:
    """The format that `config` names, or the only one of `accepted` whose columns are all there.

    A column has the name of its role unless `config.columns` or `config.column` give another. Where several formats
    fit, those that use the columns named in the configuration go first.

    Args:
      config: what the user says about it.
      source: stands in messages.
      found: the columns of the data.
      accepted: formats that can be used here.

    Raises:
      InputError: no format fits, or several; a column that is not there; a role that the format does not use.
    """
    found = list(found)
    check_columns(source, config.columns.values(), found)
    names = _names(config)
    roles = {format: _roles(format, names, found) for format in accepted}
    format = config.format
    if format == "auto":
        fitting = [name for name in accepted if roles[name]]
        named = set(config.columns) - {"split_place"}
        if config.column != DEFAULT_COLUMN:
            preferred = [
                name for name in fitting if named <= set(roles[name]) and {"prompt", "text"} & set(roles[name])
            ]
        else:
            preferred = [name for name in fitting if named and named <= set(roles[name])]
        fitting = preferred if len(preferred) == 1 else fitting
        if len(fitting) != 1:
            problem = f"fit {' and '.join(fitting)}" if fitting else "fit no format"
            raise InputError(
                f"{source}: columns {', '.join(map(repr, found))} {problem} that can be used here:\n"
                + "\n".join(f"  {name}: {describe(name)}" for name in accepted)
                + "\nname the format in data.format, or the columns of its roles in data.columns"
            )
        format = fitting[0]
    elif format not in accepted:
        raise InputError(f"data.format={format!r} cannot be used here; give auto or {', '.join(accepted)}")
    if not roles[format]:
        raise InputError(
            f"{source}: data.format={format} wants columns {describe(format)}; it has {', '.join(map(repr, found))}"
        )
    if unused := [role for role in config.columns if role not in roles[format]]:
        raise InputError(f"data.columns: {', '.join(unused)} has no effect with the format {format}")
    return Layout(source, format, {role: names[role] for role in roles[format]})


def detect_prompt(config: DataConfig, source: str, found: Iterable[str]) -> Layout:
    """The columns that hold prompts: one of prompts, or else conversations, or else pairs of them.

    Raises:
      InputError: none of them is there, or `data.format` names one that has no prompts.
    """
    found = list(found)
    check_columns(source, config.columns.values(), found)
    names = _names(config)
    formats: dict[Format, tuple[Format, ...]] = {
        "prompt": ("prompt",),
        "prompt_completion": ("prompt",),
        "chat": ("chat",),
        "preference": ("prompt", "preference"),
    }
    if config.format != "auto" and config.format not in formats:
        raise InputError(f"data.format={config.format!r} has no prompts; give auto or {', '.join(formats)}")
    wanted = ("prompt", "chat", "preference") if config.format == "auto" else formats[config.format]
    for format in wanted:
        if roles := _roles(format, names, found):
            return Layout(source, format, {role: names[role] for role in roles})
    check_columns(source, [names[role] for role in NEEDS[wanted[0]][0]], found)
    raise AssertionError(wanted)


def describe(format: Format) -> str:
    """The columns of a format, in words."""
    sets = " or ".join(", ".join(roles) for roles in NEEDS[format])
    return sets + (f" (and perhaps {', '.join(MAY_HAVE[format])})" if format in MAY_HAVE else "")


def prompt_of(layout: Layout, row: int, record: Record) -> Side:
    """What is asked for an answer: a text, or messages that end where the assistant's turn begins.

    Raises:
      InputError: neither, or nothing is asked.
    """
    match layout.format:
        case "preference":
            chosen, _ = preference_of(layout, row, record, chat_template=False)
            if isinstance(chosen, Plain):
                raise InputError(f"{layout.at(row, 'chosen')} is text, and no column tells the prompt from the answer")
            return chosen.messages[: chosen.start]
        case "chat":
            messages = _messages(layout, row, "messages", layout.side(row, record, "messages"))
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            if not messages:
                raise InputError(f"{layout.at(row, 'messages')} holds nothing for the assistant to answer")
            return messages
    prompt = layout.side(row, record, "prompt")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise InputError(f"{layout.at(row, 'prompt')} ends with a message of the assistant")
    return prompt


def completion_of(layout: Layout, row: int, record: Record, chat_template: bool) -> Exchange:
    """What a record of the formats text, prompt_completion, chat and labelled says.

    Texts are taken as they are, or with `chat_template` as what a user and the assistant say. Without a prompt the
    whole text is the completion; in a conversation the first message of the assistant starts it.

    Raises:
      InputError: values that are neither texts nor messages, or messages in an order that cannot be used.
      Unusable: nothing is said.
    """
    if "messages" in layout.columns:
        messages = _messages(layout, row, "messages", layout.side(row, record, "messages"))
        start = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
        if start is None:
            raise Unusable(f"{layout.at(row, 'messages')} holds no message of the assistant")
        exchange: Exchange = Conversation(messages, start)
        _check_said(layout, row, "messages", exchange)
        return exchange
    if "text" in layout.columns:
        if chat_template:
            raise InputError("data.chat_template=true has no effect on the column of texts; give prompts or messages")
        text = layout.side(row, record, "text")
        if not isinstance(text, str):
            raise InputError(f"{layout.at(row, 'text')} holds messages; name it in data.columns.messages")
        exchange = Plain("", text)
        _check_said(layout, row, "text", exchange)
        return exchange
    prompt, completion = layout.side(row, record, "prompt"), layout.side(row, record, "completion")
    if isinstance(prompt, str) and isinstance(completion, str) and not chat_template:
        exchange = Plain(prompt, completion)
        _check_said(layout, row, "completion", exchange)
        return exchange
    asked = _messages(layout, row, "prompt", prompt, "user")
    return _conversation(layout, row, "completion", asked, _messages(layout, row, "completion", completion))


def preference_of(layout: Layout, row: int, record: Record, chat_template: bool) -> tuple[Exchange, Exchange]:
    """The chosen and the rejected exchange of a record; their prompts are the same.

    Without a prompt column, the messages that both begin with are the prompt; so they are where a prompt column only
    repeats how both begin. Two texts without a prompt column have none.

    Raises:
      InputError: as `completion_of`.
      Unusable: both are the same, or nothing is said.
    """
    chosen, rejected = layout.side(row, record, "chosen"), layout.side(row, record, "rejected")
    prompt = layout.side(row, record, "prompt") if "prompt" in layout.columns else None
    first: Exchange
    second: Exchange
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list) and not chat_template:
        first, second = Plain(prompt or "", chosen), Plain(prompt or "", rejected)
        _check_said(layout, row, "chosen", first)
        _check_said(layout, row, "rejected", second)
    else:
        asked = [] if prompt is None else _messages(layout, row, "prompt", prompt, "user")
        better, worse = _messages(layout, row, "chosen", chosen), _messages(layout, row, "rejected", rejected)
        if better[: len(asked)] == asked == worse[: len(asked)]:
            common = _common(better, worse)
            asked, better, worse = better[:common], better[common:], worse[common:]
        first = _conversation(layout, row, "chosen", asked, better)
        second = _conversation(layout, row, "rejected", asked, worse)
    if first == second:
        raise Unusable(f"{layout.at(row, 'chosen')} says the same as {layout.columns['rejected']!r}")
    return first, second


def _names(config: DataConfig) -> dict[Role, str]:
    """The column of every role, there or not."""
    roles = {role for sets in NEEDS.values() for roles in sets for role in roles}
    names: dict[Role, str] = {role: role for role in (*roles, "margin", "split_place")}
    if config.column != DEFAULT_COLUMN:
        names |= {"prompt": config.column, "text": config.column}
    return names | config.columns


def _roles(format: Format, names: dict[Role, str], found: list[str]) -> list[Role]:
    """The roles of a format that the columns play; none if one that it needs is missing."""
    for needed in NEEDS[format]:
        if all(names[role] in found for role in needed):
            extra = [role for role in (*MAY_HAVE.get(format, ()), "split_place") if names[role] in found]
            return [*needed, *extra]
    return []


def _message(place: str, message: object) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"{place} is {message!r:.100}; give {{role: ..., content: ...}}")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise InputError(f"{place}: content is {content!r:.100}; give text")
    if content and not _is_text(content):
        raise InputError(f"{place} holds half a surrogate pair, which is no character")
    return {"content": content} | {name: value for name, value in message.items() if value is not None}


def _is_text(value: str) -> bool:
    """Whether tokenizers can read it; JSON's \\u escapes can say what is no character."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _messages(layout: Layout, row: int, role: Role, side: Side, speaker: str = "assistant") -> list[Message]:
    if isinstance(side, str):
        if role == "messages":
            raise InputError(f"{layout.at(row, role)} is text; give a list of {{role, content}} messages")
        return [{"role": speaker, "content": side}]
    return side


def _conversation(layout: Layout, row: int, role: Role, asked: list[Message], answer: list[Message]) -> Conversation:
    if asked and asked[-1]["role"] == "assistant":
        raise InputError(f"{layout.at(row, role)}: the prompt ends with a message of the assistant")
    if answer[0]["role"] != "assistant":
        raise InputError(
            f"{layout.at(row, role)}: the answer begins with a message of {answer[0]['role']!r}, not of the assistant"
        )
    conversation = Conversation([*asked, *answer], len(asked))
    _check_said(layout, row, role, conversation)
    return conversation


def _check_said(layout: Layout, row: int, role: Role, exchange: Exchange) -> None:
    if isinstance(exchange, Plain):
        empty = not exchange.completion.strip()
    else:
        answers = [message for message in exchange.messages[exchange.start :] if message["role"] == "assistant"]
        empty = not any(message.get("tool_calls") or message["content"].strip() for message in answers)
    if empty:
        raise Unusable(f"{layout.at(row, role)} is empty")


def _common(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages both begin with, as far as either goes on with one of the assistant."""
    pairs = list(zip(chosen, rejected, strict=False))
    common = next((i for i, (first, second) in enumerate(pairs) if first != second), len(pairs) - 1)
    while common and not chosen[common]["role"] == rejected[common]["role"] == "assistant":
        common -= 1
    return common

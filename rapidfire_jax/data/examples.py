"""Tokenised examples for supervised fine-tuning, reward models and preference optimisation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, islice
from typing import TYPE_CHECKING, NamedTuple

from rapidfire_jax.config.data import DataConfig, Format
from rapidfire_jax.data.batches import Examples, Streamed
from rapidfire_jax.data.formats import (
    Conversation,
    Exchange,
    Layout,
    Plain,
    Unusable,
    cleaned,
    completion_of,
    detect,
    key,
    preference_of,
    said,
)
from rapidfire_jax.data.records import Record
from rapidfire_jax.data.sources import open_source
from rapidfire_jax.data.splits import fraction
from rapidfire_jax.data.tokens import Encoded, Encoder, Row
from rapidfire_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # records that are tokenised together


@dataclass(frozen=True)
class Completion:
    """A sequence to imitate; `trained` is True on the tokens that count in the loss."""

    tokens: Row
    trained: tuple[bool, ...]


@dataclass(frozen=True)
class Preference:
    """A prompt and two completions, ends included; `margin` says how much better the first is, 0 if nobody knows."""

    prompt: Row
    chosen: Row
    rejected: Row
    margin: float
    prompt_text: str
    chosen_text: str
    rejected_text: str


@dataclass(frozen=True)
class Labelled:
    """A sequence, its end included, and the number it was given."""

    tokens: Row
    label: float


def load_completions(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    held_out: int,
    context: int,
    completion_only: bool = True,
) -> tuple[Examples[Completion] | Streamed[Completion], tuple[Completion, ...]]:
    """Sequences to imitate, from the formats text, prompt_completion and chat: those to train on, and those held out.

    A plain text or completion ends with EOS; a conversation is what the chat template renders. With `completion_only`
    the tokens to train on are completions and what the assistant says from there on, each with the token that ends it;
    a text is a completion without a prompt. They are the tokens inside `{% generation %}` where the template has that.
    White space stays as it is unless `data.clean` is true, which leaves messages alone.

    Which side a record is on is decided by the hash of its prompt, of its text if it has none, or by its column
    `split_place`. In memory, `seed` chooses among the held-out examples; of a stream they are the first. An example
    longer than `data.max_length` or `context` is an error, left out, or cut at its end, as `data.too_long` says; it is
    left out as well if the cut leaves nothing to learn from.

    Args:
      config: where the records are, and what they hold.
      tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
      seed: of the order of training and the choice of held-out examples.
      held_out: number of held-out examples.
      context: longest sequence the model takes, in tokens.
      completion_only: whether prompts are not trained on.

    Raises:
      InputError: unreadable or unusable data, an example that is too long, or too few of them.
    """

    def parse(layout: Layout, row: int, record: Record) -> _Parsed:
        exchange = completion_of(layout, row, record, config.chat_template)
        return _Parsed(row, layout.place(row, record, key(exchange)), (exchange,), 0.0)

    def encode(encoder: Encoder, exchanges: list[Exchange], places: list[str]) -> list[Encoded]:
        if encoder.has_generation_tags():
            numbered = [
                encoder.encode_marked(exchange, place) if isinstance(exchange, Conversation) else None
                for exchange, place in zip(exchanges, places, strict=True)
            ]
        else:
            numbered = [None] * len(exchanges)
        rest = [i for i, encoded in enumerate(numbered) if encoded is None]
        others = iter(encoder.encode_exchanges([exchanges[i] for i in rest], [places[i] for i in rest]))
        return [encoded or next(others) for encoded in numbered]

    def make(parsed: _Parsed, encoded: Sequence[Encoded]) -> _Made[Completion]:
        ((prompt, completion, spoken),) = encoded
        tokens = prompt + completion
        trained = (False,) * len(prompt) + spoken if completion_only else (True,) * len(tokens)

        def cut(limit: int) -> Completion | None:
            return Completion(tokens[:limit], trained[:limit]) if any(trained[:limit]) else None

        return _Made(parsed.row, len(tokens), cut)

    accepted: tuple[Format, ...] = ("text", "prompt_completion", "chat")
    return _load(config, tokenizer, _Task(accepted, parse, encode, make), seed, held_out, context)


def load_preferences(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, seed: int, held_out: int, context: int
) -> tuple[Examples[Preference] | Streamed[Preference], tuple[Preference, ...]]:
    """Pairs of completions, the first the better one: those to train on, and those held out.

    Prompt and completion are encoded as in `load_completions`; without a prompt, `prompt` holds what the tokenizer puts
    before a text, which may be nothing. Sides and lengths are decided as there; the length of a pair is that of its
    prompt and longer completion, and a cut shortens the completions.

    Raises:
      InputError: as `load_completions`.
    """

    def parse(layout: Layout, row: int, record: Record) -> _Parsed:
        chosen, rejected = preference_of(layout, row, record, config.chat_template)
        known = "margin" in layout.columns and layout.value(record, "margin") not in (None, "")
        margin = layout.number(row, record, "margin") if known else 0.0
        return _Parsed(row, layout.place(row, record, key(chosen)), (chosen, rejected), margin)

    def make(parsed: _Parsed, encoded: Sequence[Encoded]) -> _Made[Preference]:
        first, second = encoded
        prompt, chosen, rejected = first.prompt, _said_tokens(first), _said_tokens(second)
        texts = _prompt_text(parsed.exchanges[0]), *map(_completion_text, parsed.exchanges)

        def cut(limit: int) -> Preference | None:
            room = max(limit - len(prompt), 0)
            pair = chosen[:room], rejected[:room]
            return None if pair[0] == pair[1] else Preference(prompt, *pair, parsed.number, *texts)

        return _Made(parsed.row, len(prompt) + max(len(chosen), len(rejected)), cut)

    task = _Task(("preference",), parse, Encoder.encode_exchanges, make)
    return _load(config, tokenizer, task, seed, held_out, context)


def load_labelled(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, seed: int, held_out: int, context: int
) -> tuple[Examples[Labelled] | Streamed[Labelled], tuple[Labelled, ...]]:
    """Sequences with a number each: those to train on, and those held out.

    The sequence is a text, a prompt and its completion, or a conversation, encoded as in `load_completions`; sides and
    lengths are decided as there.

    Raises:
      InputError: as `load_completions`, or a label that is not a finite number.
    """

    def parse(layout: Layout, row: int, record: Record) -> _Parsed:
        exchange = completion_of(layout, row, record, config.chat_template)
        place = layout.place(row, record, key(exchange))
        if isinstance(exchange, Conversation):
            last = max(i for i, message in enumerate(exchange.messages) if message["role"] == "assistant")
            exchange = Conversation(exchange.messages, last)
        return _Parsed(row, place, (exchange,), layout.number(row, record, "label"))

    def make(parsed: _Parsed, encoded: Sequence[Encoded]) -> _Made[Labelled]:
        tokens = encoded[0].prompt + _said_tokens(encoded[0])
        return _Made(parsed.row, len(tokens), lambda limit: Labelled(tokens[:limit], parsed.number))

    task = _Task(("labelled",), parse, Encoder.encode_exchanges, make)
    return _load(config, tokenizer, task, seed, held_out, context)


class _Parsed(NamedTuple):
    """A record before it is tokenised: where it lies on the line of splits, what is said, and its margin or label."""

    row: int
    place: float
    exchanges: tuple[Exchange, ...]
    number: float


class _Made[E](NamedTuple):
    """An example of `length` tokens; `cut(limit)` gives it in `limit` tokens, None if nothing is left to learn from."""

    row: int
    length: int
    cut: Callable[[int], E | None]


class _Task[E](NamedTuple):
    """How records of some formats become examples."""

    accepted: tuple[Format, ...]
    parse: Callable[[Layout, int, Record], _Parsed]
    encode: Callable[[Encoder, list[Exchange], list[str]], list[Encoded]]
    make: Callable[[_Parsed, Sequence[Encoded]], _Made[E]]


def _load[E](
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    task: _Task[E],
    seed: int,
    held_out: int,
    context: int,
) -> tuple[Examples[E] | Streamed[E], tuple[E, ...]]:
    for name in ("prompt_tokens", "max_prompt_length"):
        if (value := getattr(config, name)) != DataConfig.model_fields[name].default:
            raise InputError(f"data.{name}={value} has no effect on examples with completions; data.max_length has")
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer of this model has no end-of-sequence token, which ends an example")
    source = open_source(config)
    if config.streaming:
        layout = detect(config, source.name, source.first()[1], task.accepted)
        maker = _Maker(config, task, layout, Encoder(tokenizer), min(config.max_length, context), context)

        def epoch(side: tuple[float, float]) -> Iterator[E]:
            return maker.fit(maker.encode(_on(side, maker.parse(source.stream()))))

        evaluation = tuple(islice(epoch(config.held_out), held_out))
        maker.check_held_out(len(evaluation), held_out, "the stream")
        return Streamed(source.name, lambda: epoch(config.train), seed, config.shuffle_buffer), evaluation

    records = source.in_memory()
    layout = detect(config, source.name, next(iter(records.values())), task.accepted)
    maker = _Maker(config, task, layout, Encoder(tokenizer), min(config.max_length, context), context)
    parsed = list(maker.parse(records.items()))
    training = list(maker.encode(_on(config.train, parsed)))
    maker.check_lengths(training)
    examples = tuple(maker.fit(training))
    whole = f"{len(records):,} records"
    if not examples:
        raise InputError(f"{source.name}: no training examples: {maker.shortage(config.train, whole)}")
    candidates = sorted(
        _on(config.held_out, parsed), key=lambda item: fraction(key(item.exchanges[0]), f"held out, seed {seed}")
    )
    evaluation = tuple(islice(maker.fit(maker.encode(candidates)), held_out))
    maker.check_held_out(len(evaluation), held_out, whole)
    left_out = len(records) - len(parsed) + len(training) - len(examples)
    return Examples(examples, seed, left_out), evaluation


def _on(side: tuple[float, float], parsed: Iterable[_Parsed]) -> Iterator[_Parsed]:
    low, high = side
    return (item for item in parsed if low <= item.place < high)


@dataclass(frozen=True)
class _Maker[E]:
    """From records to examples of at most `limit` tokens, step by step, each step an iterator."""

    config: DataConfig
    task: _Task[E]
    layout: Layout
    encoder: Encoder
    limit: int
    context: int

    def parse(self, rows: Iterable[tuple[int, Record]]) -> Iterator[_Parsed]:
        """The usable records."""
        for row, record in rows:
            try:
                parsed = self.task.parse(self.layout, row, record)
                if self.config.clean:
                    place = f"{self.layout.source}: row {row}"
                    parsed = parsed._replace(exchanges=tuple(cleaned(each, place) for each in parsed.exchanges))
                yield parsed
            except Unusable as problem:
                if self.config.unusable == "error":
                    raise InputError(f"{problem}; data.unusable=drop leaves such records out") from None

    def encode(self, parsed: Iterable[_Parsed]) -> Iterator[_Made[E]]:
        """Their tokens."""
        for chunk in batched(parsed, CHUNK):
            exchanges = [exchange for item in chunk for exchange in item.exchanges]
            places = [f"{self.layout.source}: row {item.row}" for item in chunk for _ in item.exchanges]
            encoded = iter(self.task.encode(self.encoder, exchanges, places))
            for item in chunk:
                yield self.task.make(item, [next(encoded) for _ in item.exchanges])

    def fit(self, made: Iterable[_Made[E]]) -> Iterator[E]:
        """Those that are short enough, or cut to be."""
        for item in made:
            if item.length > self.limit and self.config.too_long != "truncate":
                if self.config.too_long == "drop":
                    continue
                raise InputError(self._too_long(item))
            example = item.cut(self.limit)
            if example is not None:
                yield example
            elif item.length <= self.limit and self.config.unusable == "error":
                raise InputError(
                    f"{self.layout.source}: row {item.row}: as tokens there is nothing to learn from, all of them are "
                    "the prompt's or both completions are the same; data.unusable=drop leaves such records out"
                )

    def check_lengths(self, made: Sequence[_Made[E]]) -> None:
        """Refuses examples that are too long, and says how many there are."""
        too_long = [item for item in made if item.length > self.limit]
        if too_long and self.config.too_long == "error":
            raise InputError(f"{self._too_long(too_long[0])}; so have {len(too_long):,} of {len(made):,} examples")

    def check_held_out(self, found: int, wanted: int, whole: str) -> None:
        """Refuses too few held-out examples."""
        if found < wanted:
            problem = f"{found} held-out examples, {wanted} are wanted"
            raise InputError(f"{self.layout.source}: {problem}: {self.shortage(self.config.held_out, whole)}")

    def shortage(self, side: tuple[float, float], whole: str) -> str:
        """Why there are too few examples, and what helps."""
        dropped = {"too long": self.config.too_long, "unusable": self.config.unusable}
        without = " and ".join(name for name, policy in dropped.items() if policy == "drop")
        less = f", less those {without}" if without else ""
        return f"the hash range {list(side)} of {whole}{less}; widen it or give more records"

    def _too_long(self, item: _Made[E]) -> str:
        return (
            f"{self.layout.source}: row {item.row}: the example has {item.length} tokens, at most {self.limit} fit "
            f"(data.max_length={self.config.max_length}; context {self.context}); data.too_long=drop leaves such "
            "examples out, truncate cuts them"
        )


def _said_tokens(encoded: Encoded) -> Row:
    """A completion up to the last token that the assistant says."""
    end = len(encoded.spoken)
    while end and not encoded.spoken[end - 1]:
        end -= 1
    return encoded.completion[:end]


def _prompt_text(exchange: Exchange) -> str:
    return exchange.prompt if isinstance(exchange, Plain) else said(exchange.messages[: exchange.start])


def _completion_text(exchange: Exchange) -> str:
    return exchange.completion if isinstance(exchange, Plain) else said(exchange.messages[exchange.start :])

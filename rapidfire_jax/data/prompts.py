"""Prompts for rollouts: tokens, their text, and the columns that rewards may look at."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rapidfire_jax.config.data import DataConfig
from rapidfire_jax.data.batches import Streamed, batch_indices
from rapidfire_jax.data.formats import Layout, Side, detect_prompt, prompt_of, said
from rapidfire_jax.data.records import Record, clean
from rapidfire_jax.data.sources import open_source
from rapidfire_jax.data.splits import fraction
from rapidfire_jax.data.tokens import Encoder, Row
from rapidfire_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALLEST_BUCKET = 8
CHUNK = 256  # records of a stream that are tokenised together
PLAIN = "prompt_plain"  # column of what was asked, before the chat template: a text or messages


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order: text, tokens, and one value a prompt of every other column of the data.

    `seed` is that of the order in which `batch` takes them; `left_out` counts prompts that are too long.
    """

    texts: tuple[str, ...]
    tokens: tuple[Row, ...]
    columns: dict[str, tuple[Any, ...]]
    seed: int = field(default=0, compare=False)
    left_out: int = field(default=0, compare=False)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.texts)

    def select(self, rows: Iterable[int]) -> "PromptSet":
        """The prompts at some places, in that order."""
        rows = list(rows)
        return PromptSet(
            texts=tuple(self.texts[i] for i in rows),
            tokens=tuple(self.tokens[i] for i in rows),
            columns={name: tuple(values[i] for i in rows) for name, values in self.columns.items()},
            seed=self.seed,
        )

    def batch(self, iteration: int, batch_size: int) -> "PromptSet":
        """The prompts of iteration number `iteration`; see `batch_indices`."""
        return self.select(batch_indices(iteration, batch_size, len(self), self.seed).tolist())


class _Prompt(NamedTuple):
    text: str
    tokens: Row
    record: Record


@dataclass(frozen=True)
class StreamedPrompts:
    """Prompts read while they are used; batches are a pure function of the iteration, as those of `Streamed` are."""

    prompts: Streamed[_Prompt]
    layout: Layout

    def batch(self, iteration: int, batch_size: int) -> PromptSet:
        """The prompts of iteration number `iteration`.

        Raises:
          InputError: the data cannot be read, hold no training prompts, or one that is empty or too long.
        """
        return _prompt_set(self.prompts.batch(iteration, batch_size), self.layout, self.prompts.seed)


def load_prompts(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    held_out: int,
    max_new_tokens: int,
    context: int,
) -> tuple[PromptSet | StreamedPrompts, PromptSet]:
    """Training prompts, all there are, and exactly `held_out` evaluation prompts.

    A text decides by its own hash which set it belongs to and, with `prompt_tokens`, after how many tokens it is cut.
    No prompt occurs twice, and none in both sets; a stream may repeat prompts of its own set. The text of a prompt is
    what its tokens decode to, special tokens included; lengths count them too. A prompt is a text, messages for the
    chat template, a conversation without its last answer, or what a chosen and a rejected conversation have in common.

    Args:
      config: where the prompts are, and what becomes of texts. Prompts that went through the chat template have a
        column "prompt_plain" with what was asked.
      tokenizer: a Hugging Face tokenizer.
      seed: chooses the evaluation prompts among those held out, and orders the batches. Those of a stream come first.
      held_out: number of evaluation prompts.
      max_new_tokens: room that a response needs, in tokens.
      context: longest sequence the model takes, in tokens.

    Raises:
      InputError: unreadable data, a prompt that is empty or too long, or too few prompts.
    """
    if max_new_tokens >= context:
        raise InputError(
            f"rollout.max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of {context}"
        )
    if config.max_length != DataConfig.model_fields["max_length"].default:
        raise InputError(f"data.max_length={config.max_length} has no effect on prompts; data.max_prompt_length has")
    if config.too_long == "truncate":
        raise InputError("data.too_long=truncate has no effect on prompts; data.prompt_tokens cuts them")
    source = open_source(config)
    if config.streaming:
        layout = detect_prompt(config, source.name, source.first()[1])
        maker = _Maker(config, layout, Encoder(tokenizer), max_new_tokens, context)

        def epoch(side: tuple[float, float]) -> Iterator[_Prompt]:
            for chunk in batched(source.stream(), CHUNK):
                prompts = maker.prompts(maker.asked(dict(chunk), side))
                yield from maker.fitting(prompts).values()

        first = list(islice(epoch(config.held_out), held_out))
        maker.check_held_out(len(first), held_out, "the stream")
        stream = Streamed(source.name, lambda: epoch(config.train), seed, config.shuffle_buffer)
        return StreamedPrompts(stream, layout), _prompt_set(first, layout, seed)

    records = source.in_memory()
    layout = detect_prompt(config, source.name, next(iter(records.values())))
    maker = _Maker(config, layout, Encoder(tokenizer), max_new_tokens, context)

    def unique(side: tuple[float, float]) -> tuple[list[_Prompt], int]:
        found = maker.prompts(maker.asked(records, side))
        fitting = maker.fitting(found)
        kept = {prompt.text: prompt for prompt in reversed(fitting.values())}
        return list(reversed(kept.values())), len(found) - len(fitting)

    training, left_out = unique(config.train)
    whole = f"{len(records):,} records"
    if not training:
        raise InputError(f"{source.name}: no training prompts: {maker.shortage(config.train, whole)}")
    trained_on = {prompt.text for prompt in training}
    candidates = [prompt for prompt in unique(config.held_out)[0] if prompt.text not in trained_on]
    maker.check_held_out(len(candidates), held_out, whole)
    candidates.sort(key=lambda prompt: fraction(prompt.text, f"held out, seed {seed}"))
    return _prompt_set(training, layout, seed, left_out), _prompt_set(candidates[:held_out], layout, seed)


def prompt_buckets(max_length: int) -> tuple[int, ...]:
    """Widths that batches are padded to: powers of two from 8 up, then `max_length` itself."""
    powers = [SMALLEST_BUCKET]
    while powers[-1] < max_length:
        powers.append(2 * powers[-1])
    return (*powers[:-1], max_length)


def pad_batch(tokens: Sequence[Sequence[int]], buckets: Sequence[int], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as one array, padded on the left to the smallest bucket that holds the longest row.

    Returns:
      ids int32 [B, P], and mask bool [B, P], True on the tokens of a row.

    Raises:
      InputError: a row is longer than the largest bucket.
    """
    longest = max(map(len, tokens))
    if longest > max(buckets):
        raise InputError(f"a prompt of {longest} tokens is longer than the largest bucket, {max(buckets)}")
    width = min(bucket for bucket in buckets if bucket >= longest)
    ids = np.full((len(tokens), width), pad_id, np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, row_tokens in enumerate(tokens):
        start = width - len(row_tokens)
        ids[row, start:] = row_tokens
        mask[row, start:] = True
    return ids, mask


@dataclass(frozen=True)
class _Maker:
    """From records to prompts, step by step."""

    config: DataConfig
    layout: Layout
    encoder: Encoder
    max_new_tokens: int
    context: int

    def asked(self, records: dict[int, Record], side: tuple[float, float]) -> dict[int, tuple[Side, Record]]:
        """What the records on one side ask, by row."""
        asked = {}
        for row, record in records.items():
            prompt = prompt_of(self.layout, row, record)
            text = prompt if isinstance(prompt, str) else said(prompt)
            if side[0] <= self.layout.place(row, record, text) < side[1]:
                asked[row] = (prompt, record)
        return asked

    def prompts(self, asked: dict[int, tuple[Side, Record]]) -> dict[int, _Prompt]:
        """Prompts by row; texts too short for `prompt_tokens` are left out."""
        config, encoder = self.config, self.encoder
        if config.chat_template and not encoder.tokenizer.chat_template:
            raise InputError(
                "data.chat_template is true, but the tokenizer of this model has no chat template; set it false"
            )
        texts = {row: prompt for row, (prompt, _) in asked.items() if isinstance(prompt, str)}
        chats = {row: prompt for row, (prompt, _) in asked.items() if not isinstance(prompt, str)}
        if config.prompt_tokens and chats:
            raise InputError(f"{self._at(min(chats))} holds messages; data.prompt_tokens cuts texts only")
        texts = self._cleaned(texts)
        tokens: dict[int, list[int]] = {}
        if config.prompt_tokens:
            low, high = config.prompt_tokens
            encoded = self._encode(texts, special=not config.chat_template)
            long = {row: ids for row, ids in encoded.items() if len(ids) > high}
            tokens = {
                row: ids[: low + int(fraction(texts[row], "length") * (high - low + 1))] for row, ids in long.items()
            }
            texts = self._decode(tokens)
        empty = {row for row, text in texts.items() if not text.strip()}
        empty |= {row for row, messages in chats.items() if not said(messages).strip()}
        if empty and config.unusable == "error":
            raise InputError(f"{self._at(min(empty))} is empty; data.unusable=drop leaves such prompts out")
        each: dict[int, Any]
        for each in (texts, chats, tokens):
            for row in empty & each.keys():
                del each[row]
        plain: dict[int, Side] = dict(chats)
        if config.chat_template:
            plain |= texts
            chats |= {row: [{"role": "user", "content": text}] for row, text in texts.items()}
            texts, tokens = {}, {}
        rendered = {row: encoder.render(chat, self._at(row), answer=True) for row, chat in chats.items()}
        tokens |= self._encode({row: text for row, text in texts.items() if row not in tokens}, special=True)
        tokens |= self._encode(rendered, special=False)
        decoded = self._decode(tokens)
        return {
            row: _Prompt(
                decoded[row],
                encoder.row(tokens[row]),
                record | ({PLAIN: plain[row]} if row in plain else {}),
            )
            for row, (_, record) in asked.items()
            if row in tokens
        }

    def fitting(self, prompts: dict[int, _Prompt]) -> dict[int, _Prompt]:
        """Those that are short enough."""
        limit = min(self.config.max_prompt_length, self.context - self.max_new_tokens)
        too_long = {row: len(prompt.tokens) for row, prompt in prompts.items() if len(prompt.tokens) > limit}
        if self.config.too_long == "error":
            for row, length in too_long.items():
                such = "" if self.config.streaming else f"; so have {len(too_long):,} of {len(prompts):,} prompts"
                raise InputError(
                    f"{self.layout.source}: row {row}: the prompt has {length} tokens, at most {limit} fit "
                    f"(data.max_prompt_length={self.config.max_prompt_length}; context {self.context} less "
                    f"rollout.max_new_tokens={self.max_new_tokens}){such}; data.prompt_tokens cuts prompts, "
                    "data.too_long=drop leaves them out"
                )
        return {row: prompt for row, prompt in prompts.items() if row not in too_long}

    def check_held_out(self, found: int, wanted: int, whole: str) -> None:
        """Refuses too few evaluation prompts."""
        if found < wanted:
            problem = f"{found} held-out prompts, {wanted} are wanted"
            raise InputError(f"{self.layout.source}: {problem}: {self.shortage(self.config.held_out, whole)}")

    def shortage(self, side: tuple[float, float], whole: str) -> str:
        """Why there are too few prompts, and what helps."""
        tokens = self.config.prompt_tokens
        short = f", texts of {tokens[1]} tokens or fewer" if tokens else ""
        return f"the hash range {list(side)} of {whole}, less duplicates{short}; widen it or give more records"

    def _at(self, row: int) -> str:
        role = next(role for role in ("prompt", "messages", "chosen") if role in self.layout.columns)
        return self.layout.at(row, role)

    def _cleaned(self, texts: dict[int, str]) -> dict[int, str]:
        tokens = self.config.prompt_tokens
        cleaned = tokens is not None if self.config.clean is None else self.config.clean
        if not cleaned:
            return texts
        words = tokens[1] + 1 if tokens else None  # a word is a token or more
        return {row: clean(text, words) for row, text in texts.items()}

    def _encode(self, texts: dict[int, str], *, special: bool) -> dict[int, list[int]]:
        return dict(zip(texts, self.encoder.encode(list(texts.values()), special=special), strict=True))

    def _decode(self, tokens: dict[int, list[int]]) -> dict[int, str]:
        if not tokens:
            return {}
        texts = self.encoder.tokenizer.batch_decode(list(tokens.values()), clean_up_tokenization_spaces=False)
        return dict(zip(tokens, texts, strict=True))


def _prompt_set(prompts: Sequence[_Prompt], layout: Layout, seed: int, left_out: int = 0) -> PromptSet:
    other = dict.fromkeys(name for prompt in prompts for name in prompt.record)
    names = [name for name in other if name != layout.columns.get("prompt")]
    return PromptSet(
        texts=tuple(prompt.text for prompt in prompts),
        tokens=tuple(prompt.tokens for prompt in prompts),
        columns={name: tuple(prompt.record.get(name) for prompt in prompts) for name in names},
        seed=seed,
        left_out=left_out,
    )

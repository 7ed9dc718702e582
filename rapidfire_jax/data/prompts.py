"""Prompts for rollouts: tokens, their text, and the columns that rewards may look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rapidfire_jax.config import DataConfig
from rapidfire_jax.data.records import Record, clean, locate, read_records
from rapidfire_jax.data.splits import fraction
from rapidfire_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALLEST_BUCKET = 8


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order: text, tokens, and one value a prompt of every other column of the file."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    columns: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.texts)


class _Prompt(NamedTuple):
    text: str
    tokens: tuple[int, ...]
    record: Record


def load_prompts(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    held_out: int,
    max_new_tokens: int,
    context: int,
) -> tuple[PromptSet, PromptSet]:
    """Training prompts, all there are, and exactly `held_out` evaluation prompts.

    A text decides by its own hash which set it belongs to and, with `prompt_tokens`, after how many tokens it is cut.
    No prompt occurs twice, and none in both sets. The text of a prompt is what its tokens decode to, special tokens
    included; lengths count them too.

    Args:
      config: where the texts are and how they become prompts.
      tokenizer: a Hugging Face tokenizer.
      seed: chooses the evaluation prompts among the texts held out.
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
    path = locate(config.path)
    records = read_records(path, config.where, (config.column,))
    places = {row: fraction(record[config.column]) for row, record in records.items()}

    def prompts(low: float, high: float) -> list[_Prompt]:
        rows = {row: record for row, record in records.items() if low <= places[row] < high}
        found = _tokenize(path, rows, config, tokenizer)
        _check_lengths(path, found, config.max_prompt_length, max_new_tokens, context)
        unique = {prompt.text: prompt for prompt in reversed(found.values())}
        return list(reversed(unique.values()))

    training = prompts(*config.train)
    if not training:
        raise InputError(f"{path}: no training prompts: {_shortage(config, config.train, len(records))}")
    trained_on = {prompt.text for prompt in training}
    candidates = [prompt for prompt in prompts(*config.held_out) if prompt.text not in trained_on]
    if len(candidates) < held_out:
        shortage = _shortage(config, config.held_out, len(records))
        raise InputError(f"{path}: {len(candidates)} held-out prompts, {held_out} are wanted: {shortage}")
    candidates.sort(key=lambda prompt: fraction(prompt.text, f"held out, seed {seed}"))
    return _prompt_set(training, config.column), _prompt_set(candidates[:held_out], config.column)


def prompt_buckets(max_length: int) -> tuple[int, ...]:
    """Widths that batches are padded to: powers of two from 8 up, then `max_length` itself."""
    powers = [SMALLEST_BUCKET]
    while powers[-1] < max_length:
        powers.append(2 * powers[-1])
    return (*powers[:-1], max_length)


def batch_indices(iteration: int, batch_size: int, size: int, seed: int) -> np.ndarray:
    """Which of `size` prompts iteration number `iteration` takes, int64 [batch_size].

    The batches of all iterations laid end to end are one permutation of all prompts after another, each drawn anew.
    """
    epochs, places = np.divmod(iteration * batch_size + np.arange(batch_size), size)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(size) for epoch in np.unique(epochs).tolist()}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)])


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


def _tokenize(
    path: Path, records: dict[int, Record], config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> dict[int, _Prompt]:
    """Prompts by row; rows too short for `prompt_tokens` are left out."""
    if config.chat_template and not tokenizer.chat_template:
        raise InputError(
            "data.chat_template is true, but the tokenizer of this model has no chat template; set it false"
        )
    rows = list(records)
    words = config.prompt_tokens[1] + 1 if config.prompt_tokens else None  # a word is a token or more
    texts = [clean(records[row][config.column], words) for row in rows]
    if config.prompt_tokens:
        low, high = config.prompt_tokens
        encoded = zip(rows, texts, _encode(tokenizer, texts, special=not config.chat_template), strict=True)
        enough = [(row, text, ids) for row, text, ids in encoded if len(ids) > high]
        rows = [row for row, _, _ in enough]
        tokens = [ids[: low + int(fraction(text, "length") * (high - low + 1))] for _, text, ids in enough]
        texts = _decode(tokenizer, tokens)
    if not rows:
        return {}
    for row, text in zip(rows, texts, strict=True):
        if not text:
            raise InputError(f"{path}: row {row}: column {config.column!r} is empty")
    if config.chat_template:
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    if config.chat_template or not config.prompt_tokens:
        tokens = _encode(tokenizer, texts, special=not config.chat_template)
        texts = _decode(tokenizer, tokens)
    return {row: _Prompt(text, tuple(ids), records[row]) for row, text, ids in zip(rows, texts, tokens, strict=True)}


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _decode(tokenizer: "PreTrainedTokenizerBase", tokens: list[list[int]]) -> list[str]:
    if not tokens:
        return []
    return tokenizer.batch_decode(tokens, clean_up_tokenization_spaces=False)


def _check_lengths(
    path: Path, prompts: dict[int, _Prompt], max_prompt_length: int, max_new_tokens: int, context: int
) -> None:
    limit = min(max_prompt_length, context - max_new_tokens)
    too_long = {row: len(prompt.tokens) for row, prompt in prompts.items() if len(prompt.tokens) > limit}
    for row, length in too_long.items():
        raise InputError(
            f"{path}: row {row}: the prompt has {length} tokens, at most {limit} fit (data.max_prompt_length="
            f"{max_prompt_length}; context {context} less rollout.max_new_tokens={max_new_tokens}); so have "
            f"{len(too_long):,} of {len(prompts):,} prompts; data.prompt_tokens cuts them"
        )


def _shortage(config: DataConfig, place: tuple[float, float], total: int) -> str:
    short = f", texts of {config.prompt_tokens[1]} tokens or fewer" if config.prompt_tokens else ""
    return f"the hash range {list(place)} of {total:,} records, less duplicates{short}; widen it or give more records"


def _prompt_set(prompts: list[_Prompt], column: str) -> PromptSet:
    names = [name for name in prompts[0].record if name != column] if prompts else []
    return PromptSet(
        texts=tuple(prompt.text for prompt in prompts),
        tokens=tuple(prompt.tokens for prompt in prompts),
        columns={name: tuple(prompt.record[name] for prompt in prompts) for name in names},
    )

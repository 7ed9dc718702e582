"""Arrays for the offline algorithms from tokenised examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from rapidfire_jax.algorithms.offline import CompletionBatch, LabelledBatch, OfflineAlgorithm, PreferenceBatch
from rapidfire_jax.config import OfflineRunConfig
from rapidfire_jax.config.data import Format
from rapidfire_jax.data.batches import Examples, Streamed
from rapidfire_jax.data.examples import (
    Completion,
    Labelled,
    Preference,
    load_completions,
    load_labelled,
    load_preferences,
)
from rapidfire_jax.data.formats import detect
from rapidfire_jax.data.packing import PackedRows, PackedStream, pack, packed_batch, right_padded
from rapidfire_jax.data.prompts import pad_batch, prompt_buckets
from rapidfire_jax.data.sources import open_source
from rapidfire_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMATS: dict[str, Format] = {"preferences": "preference", "labelled": "labelled"}


@dataclass(frozen=True)
class Batches:
    """What a run trains on and is evaluated on."""

    train: Callable[[int], Any]  # batch of an iteration, a pure function of it
    held_out: list[Any]
    rows: int | None  # of an epoch; None of a stream
    widest: Callable[[], Any] | None  # a batch as large as any; None of a stream, which does not know


def load_batches(
    config: OfflineRunConfig, algorithm: OfflineAlgorithm, tokenizer: "PreTrainedTokenizerFast", context: int
) -> Batches:
    """The batches of a run.

    Raises:
      InputError: data that cannot be read or used, or too few of them.
    """
    data, rows = config.data, config.settings.batch_size
    width = min(data.max_length, context)
    buckets = prompt_buckets(width)
    chosen: Any = {"seed": config.seed, "held_out": config.training.eval_examples, "context": context}
    if algorithm.examples == ("completions",):
        completion_only = config.settings.completion_only
        completions, held_out = load_completions(data, tokenizer, **chosen, completion_only=completion_only)
        if config.settings.packing:
            return _packed(completions, held_out, rows, width, config.seed)
        return _cut(completions, held_out, rows, lambda examples: completion_batch(examples, rows, buckets))
    source = open_source(data)
    format = detect(data, source.name, source.first()[1], [FORMATS[name] for name in algorithm.examples]).format
    if format == "labelled":
        texts, held_out_texts = load_labelled(data, tokenizer, **chosen)
        if isinstance(texts, Examples):  # those of a stream are looked at as they come
            _check_labels(texts, source.name)
        make = lambda examples: labelled_batch(examples, rows, buckets, source.name)  # noqa: E731
        return _cut(texts, held_out_texts, rows, make)
    pairs, held_out_pairs = load_preferences(data, tokenizer, **chosen)
    return _cut(pairs, held_out_pairs, rows, lambda examples: preference_batch(examples, rows, buckets))


def real_tokens(batch: CompletionBatch | PreferenceBatch | LabelledBatch) -> int:
    """Tokens of a batch that are not padding."""
    mask = batch.segments if isinstance(batch, CompletionBatch) else batch.attention_mask
    return int((np.asarray(mask) > 0).sum())


def completion_batch(examples: Sequence[Completion], rows: int, buckets: Sequence[int]) -> CompletionBatch:
    """One example a row, padded on the right; rows without an example hold no tokens."""
    longest = max(len(example.tokens) for example in examples)
    width = min(bucket for bucket in buckets if bucket >= longest)
    return _completion_batch([[example] for example in examples], rows, width)


def preference_batch(examples: Sequence[Preference], rows: int, buckets: Sequence[int]) -> PreferenceBatch:
    """Pairs as arrays: prompts padded on the left, responses on the right; filled up with pairs without tokens.

    Without a prompt nothing stands before the first token of a response: it is not one of those in `mask_t`.
    """
    fill: list[tuple[int, ...]] = [()] * (rows - len(examples))
    prompts = [example.prompt for example in examples for _ in range(2)] + fill * 2
    answers = [answer for example in examples for answer in (example.chosen, example.rejected)] + fill * 2
    prompt_ids, prompt_mask = pad_batch(prompts, (1, *buckets), pad_id=0)
    answer_ids, answer_mask = right_padded(answers, buckets)
    mask_t = answer_mask.copy()
    mask_t[:, 0] &= prompt_mask[:, -1]
    pairs = lambda *parts: np.concatenate(parts, axis=1).reshape(rows, 2, -1)  # noqa: E731
    margin = np.array([example.margin for example in examples] + [0.0] * len(fill), np.float32)
    arrays: Any = pairs(prompt_ids, answer_ids), pairs(prompt_mask, answer_mask), pairs(mask_t), margin
    return PreferenceBatch(*jax.tree.map(jnp.asarray, arrays))


def labelled_batch(examples: Sequence[Labelled], rows: int, buckets: Sequence[int], source: str) -> LabelledBatch:
    """Texts as arrays, padded on the right; filled up with texts without tokens.

    Raises:
      InputError: a label that is no probability.
    """
    _check_labels(examples, source)
    fill = rows - len(examples)
    ids, mask = right_padded([example.tokens for example in examples] + [()] * fill, buckets)
    label = np.array([example.label for example in examples] + [0.0] * fill, np.float32)
    arrays: Any = ids, mask, label
    return LabelledBatch(*jax.tree.map(jnp.asarray, arrays))


def _check_labels(examples: Sequence[Labelled], source: str) -> None:
    for example in examples:
        if not 0.0 <= example.label <= 1.0:
            accepted = "1 for the class, 0 for the other, or a probability between"
            raise InputError(f"{source}: a text has the label {example.label}; give {accepted}")


def _packed(
    train: Examples[Completion] | Streamed[Completion],
    held_out: Sequence[Completion],
    rows: int,
    width: int,
    seed: int,
) -> Batches:
    packed = PackedStream(train, width) if isinstance(train, Streamed) else PackedRows(train, width, seed)
    filled = [[held_out[i] for i in row] for row in pack([len(example.tokens) for example in held_out], width)]
    return Batches(
        train=lambda iteration: CompletionBatch(*map(jnp.asarray, packed.batch(iteration, rows))),
        held_out=[_completion_batch(filled[i : i + rows], rows, width) for i in range(0, len(filled), rows)],
        rows=len(packed) if isinstance(packed, PackedRows) else None,
        widest=lambda: _completion_batch([], rows, width),
    )


def _completion_batch(filled: Sequence[Sequence[Completion]], rows: int, width: int) -> CompletionBatch:
    empty: list[list[Completion]] = [[] for _ in range(rows - len(filled))]
    return CompletionBatch(*map(jnp.asarray, packed_batch([*filled, *empty], width)))


def _cut[E](
    train: Examples[E] | Streamed[E], held_out: Sequence[E], rows: int, make: Callable[[Sequence[E]], Any]
) -> Batches:
    return Batches(
        train=lambda iteration: make(train.batch(iteration, rows)),
        held_out=[make(held_out[i : i + rows]) for i in range(0, len(held_out), rows)],
        rows=len(train) if isinstance(train, Examples) else None,
        widest=(lambda: make([_longest(train.items)])) if isinstance(train, Examples) else None,
    )


def _longest(examples: Sequence[Any]) -> Any:
    """An example as long as any; of pairs one whose parts are."""
    if isinstance(examples[0], Preference):
        parts = ("prompt", "chosen", "rejected")
        longest: Any = {part: max((getattr(pair, part) for pair in examples), key=len) for part in parts}
        return replace(examples[0], **longest)
    return max(examples, key=lambda example: len(example.tokens))

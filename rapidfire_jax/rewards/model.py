"""Rewards from a neural reward model: a sequence classifier with one label, and its own tokenizer."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rapidfire_jax.config import RewardConfig
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.auto import FlaxAutoModelForSequenceClassification
from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.models.tokenizer import check_vocabulary, load_tokenizer
from rapidfire_jax.programs import Program
from rapidfire_jax.rewards.values import check_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN = "prompt_plain"
SMALLEST_BUCKET = 8


SCORE = Program("reward", lambda model, tokens, mask: model(tokens, mask))


def widest(tokens: int, max_length: int) -> int:
    """Width of a batch whose longest text has so many tokens: the next power of two, at most `max_length`."""
    return min(max(1 << (tokens - 1).bit_length(), SMALLEST_BUCKET), max_length)


@dataclass
class NeuralReward:
    """A reward model and how texts are put to it.

    It reads text, which its own tokenizer encodes anew. The prompts of a policy are texts with special tokens in them,
    such as the marks of a chat template. Those that the reward model's tokenizer has too stay, so that a model trained
    on the policy's own format sees that format; the others of `special_tokens` are taken out. A beginning-of-sequence
    token that both the text and the tokenizer put at the front is put there once.

    With `chat_template` the model reads a conversation in its own format. Its first turns are the column
    `prompt_plain`, if the data has one: a text, or a list of messages with `role` and `content`. Without that column
    they are the prompt, less special tokens at its front; a prompt with others in it is in a format already, and is
    refused.
    """

    config: RewardConfig
    model: RewardModel = field(repr=False)
    tokenizer: "PreTrainedTokenizerFast" = field(repr=False)
    foreign: tuple[str, ...]  # special tokens of the policy that are none here
    max_length: int
    has_cut: bool = False

    @classmethod
    def load(cls, config: RewardConfig, special_tokens: Sequence[str] = ()) -> "NeuralReward":
        """Loads the model and its tokenizer.

        Raises:
          InputError: no sequence classifier with one label there, no tokenizer or none with the chat template that is
            wanted, or a `max_length` beyond the model's context.
        """
        name = config.model
        assert name is not None
        model = FlaxAutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=config.dtype,
            compute_dtype=config.compute_dtype,
            quantize=config.quantize,
            quantize_vocabulary=config.quantize_vocabulary,
        )
        tokenizer = load_tokenizer(name)
        check_vocabulary(name, model.config.vocab_size, tokenizer)
        context = model.config.max_positions
        if config.max_length is not None and config.max_length > context:
            raise InputError(f"reward {name}: max_length={config.max_length}; the model's context is {context}")
        if config.chat_template and not tokenizer.chat_template:
            raise InputError(f"reward {name}: chat_template is true, but the model's tokenizer has none; set it false")
        known = set(tokenizer.all_special_tokens)
        foreign = sorted({token for token in special_tokens if token and token not in known}, key=len, reverse=True)
        return cls(config, model, tokenizer, tuple(foreign), config.max_length or context)

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        columns: Mapping[str, Sequence[Any]],
        response_tokens: Sequence[Sequence[int]] | None = None,
    ) -> np.ndarray:
        """The head's number at the last token of each text, float32 [B].

        Texts are scored in order of length, padded on the right to a power of two, `batch_size` at a time, so that few
        programs are compiled. Of a text longer than `max_length` the end is read, after its beginning-of-sequence
        token; standard error is told once. An empty text is read as an end-of-sequence token. `response_tokens` are
        not looked at.

        Raises:
          InputError: a score that is not finite, or a prompt that no conversation can be made of.
        """
        rows = self._encode(prompts, responses, columns)
        order = np.argsort([len(ids) for ids in rows], kind="stable")
        size = self.config.batch_size
        batches = [order[start : start + size] for start in range(0, len(rows), size)]
        running = [SCORE(self.model, *self._pad([rows[i] for i in batch])) for batch in batches]
        scores = np.zeros(len(rows), np.float32)
        for batch, values in zip(batches, running, strict=True):
            scores[batch] = np.asarray(values)[: len(batch)]
        return check_numbers(f"reward {self.config.model}", scores, len(rows))

    def _encode(
        self, prompts: list[str], responses: list[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[list[int]]:
        """Token ids of each text, 1 to `max_length` of them."""
        if not responses:
            return []
        if self.config.chat_template:
            turns = [self._conversation(i, prompt, columns) for i, prompt in enumerate(prompts)]
            chats = [
                [*before, {"role": "assistant", "content": response}]
                for before, response in zip(turns, responses, strict=True)
            ]
            texts = self.tokenizer.apply_chat_template(chats, tokenize=False)
        elif self.config.text == "response":
            texts = responses
        else:
            texts = [self._without_foreign(p) + r for p, r in zip(prompts, responses, strict=True)]
        encoded = self.tokenizer(
            texts, add_special_tokens=not self.config.chat_template, return_attention_mask=False, verbose=False
        )["input_ids"]
        rows = [self._finish(ids) for ids in encoded]
        self._tell(sum(len(ids) > self.max_length for ids in rows), len(rows))
        return [self._cut(ids) for ids in rows]

    def _conversation(self, row: int, prompt: str, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, str]]:
        """The turns before the response."""
        plain = columns[PLAIN][row] if PLAIN in columns else None
        if isinstance(plain, list | tuple):
            return list(plain)
        if isinstance(plain, str):
            return [{"role": "user", "content": plain}]
        if plain is not None:
            raise InputError(
                f"reward {self.config.model}: row {row}: column {PLAIN!r} is {plain!r:.100}; give a text, or a list of "
                "messages with role and content"
            )
        text, special = prompt, (*self.foreign, *self.tokenizer.all_special_tokens)
        while (front := next((token for token in special if text.startswith(token)), None)) is not None:
            text = text.removeprefix(front)
        if (inside := next((token for token in special if token in text), None)) is not None:
            raise InputError(
                f"reward {self.config.model}: row {row}: chat_template is true, but the prompt holds {inside!r} and is "
                f"in a chat format already; give the data a column {PLAIN!r}, or set chat_template false"
            )
        return [{"role": "user", "content": text}]

    def _without_foreign(self, prompt: str) -> str:
        for token in self.foreign:
            prompt = prompt.replace(token, "")
        return prompt

    def _finish(self, ids: list[int]) -> list[int]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if not ids or (self.config.append_eos and ids[-1] != eos):
            ids = [*ids, eos]
        return ids

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_length:
            return ids
        front = [ids[0]] if ids[0] == self.tokenizer.bos_token_id and self.max_length > 1 else []
        return front + ids[len(ids) - self.max_length + len(front) :]

    def _tell(self, cut: int, count: int) -> None:
        if cut and not self.has_cut:
            self.has_cut = True
            print(
                f"reward {self.config.model}: {cut} of {count} texts have more than {self.max_length} tokens; their "
                "ends are scored (said once)",
                file=sys.stderr,
            )

    def _pad(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 and mask bool [batch_size, width]; rows that only fill the batch have one real token."""
        width = widest(max(map(len, rows)), self.max_length)
        ids = np.zeros((self.config.batch_size, width), np.int32)
        mask = np.zeros(ids.shape, bool)
        mask[:, 0] = True
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

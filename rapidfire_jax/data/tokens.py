"""Prompts and completions as tokens, exact about where one ends and the other begins."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rapidfire_jax.data.formats import Conversation, Exchange, Message, Plain
from rapidfire_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ANCHOR = "\n"  # SentencePiece tokenizers put a space before the first character of a text; not after this one

Row = tuple[int, ...]


class Encoded(NamedTuple):
    """The tokens of an exchange; `spoken` is True on those of `completion` that the assistant says, ends included."""

    prompt: Row
    completion: Row
    spoken: tuple[bool, ...]


class _Piece(NamedTuple):
    text: str
    spoken: bool


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its chat template.

    The tokens of a prompt are those that a rollout from it starts with: of the text encoded on its own, with the
    special tokens that the tokenizer puts first, or of what the chat template renders up to where the assistant's turn
    begins. A completion is encoded together with its prompt where that leaves the prompt's tokens as they are, else by
    itself.
    """

    tokenizer: "PreTrainedTokenizerBase"

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Tokens of each text; with `special`, after those that the tokenizer puts first, but none at the end."""
        if not texts:
            return []
        rows = self._ids(texts, special)
        return [row[:-1] for row in rows] if special and self._ends_texts else rows

    def render(self, messages: list[Message], place: str, *, answer: bool = False) -> str:
        """What the chat template makes of messages; with `answer`, up to where the assistant's next turn begins.

        Raises:
          InputError: no chat template, or one that refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise InputError(f"{place}: messages need a chat template, and the tokenizer of this model has none")
        if not messages:
            raise InputError(f"{place}: begins with a message of the assistant; it needs one before to answer")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        except Exception as error:  # jinja2's own, and whatever a template raises
            raise InputError(f"{place}: the chat template refuses the messages: {error}") from None

    def encode_exchanges(self, exchanges: Sequence[Exchange], places: Sequence[str]) -> list[Encoded]:
        """The tokens of each exchange; plain completions end with EOS, those of conversations as the template says.

        White space that the template puts after the token that ends a turn counts as not spoken.

        Args:
          exchanges: what to encode.
          places: how messages about each of them begin.

        Raises:
          InputError: the template cannot render the messages, or renders the earlier ones anew with every turn.
        """
        pieces = [
            [_Piece(exchange.prompt, False), _Piece(exchange.completion, True)]
            if isinstance(exchange, Plain)
            else self._rendered(exchange, place)
            for exchange, place in zip(exchanges, places, strict=True)
        ]
        encoded: dict[int, Encoded] = {}
        for plain in (True, False):
            chosen = [i for i, exchange in enumerate(exchanges) if isinstance(exchange, Plain) is plain]
            grown = [["".join(p.text for p in pieces[i][: n + 1]) for n in range(len(pieces[i]))] for i in chosen]
            ids = iter(self.encode([text for texts in grown for text in texts], special=plain))
            for i, texts in zip(chosen, grown, strict=True):
                encoded[i] = self._joined(pieces[i], [next(ids) for _ in texts], end=plain)
        return [encoded[i] for i in range(len(exchanges))]

    def has_generation_tags(self) -> bool:
        """Whether the chat template marks what the assistant says, with `{% generation %}`."""
        return bool(self.tokenizer.chat_template and GENERATION.search(self.tokenizer.get_chat_template()))

    def encode_marked(self, conversation: Conversation, place: str) -> Encoded:
        """The tokens of a conversation, all as its completion, spoken where the template's generation tags say so.

        Raises:
          InputError: the template refuses the messages, or does not render the prompt as the conversation begins.
        """
        text = self.render(conversation.messages, place)
        out = self.tokenizer.apply_chat_template(
            conversation.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        spoken = [bool(mark) for mark in out["assistant_masks"]]
        if any(message["role"] == "assistant" for message in conversation.messages[: conversation.start]):
            prompt = self.render(conversation.messages[: conversation.start], place, answer=True)
            if not text.startswith(prompt):
                raise InputError(f"{place}: {_rewrites(conversation.start)}")
            unspoken = len(self.encode([prompt], special=False)[0])
            spoken[:unspoken] = [False] * unspoken
        return Encoded((), self.row(out["input_ids"]), tuple(spoken))

    def _ids(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    @functools.cached_property
    def _ends_texts(self) -> bool:
        return self._ids([""], True)[0][-1:] == [self.tokenizer.eos_token_id]

    @functools.cached_property
    def _special(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return {*self.tokenizer.all_special_ids, *(number for number, token in added if token.special)}

    def _rendered(self, conversation: Conversation, place: str) -> list[_Piece]:
        """A conversation cut before and after each message of the assistant from `start` on."""
        messages, whole = conversation.messages, self.render(conversation.messages, place)
        pieces, done = [], 0
        for i, message in enumerate(messages):
            if i < conversation.start or message["role"] != "assistant":
                continue
            before = self.render(messages[:i], place, answer=True)
            after = self.render(messages[: i + 1], place)
            if not (done <= len(before) <= len(after) and whole.startswith(before) and whole.startswith(after)):
                raise InputError(f"{place}: {_rewrites(i)}")
            pieces += [_Piece(whole[done : len(before)], False), _Piece(whole[len(before) : len(after)], True)]
            done = len(after)
        return [*pieces, _Piece(whole[done:], False)] if done < len(whole) else pieces

    def _joined(self, pieces: list[_Piece], grown: list[list[int]], *, end: bool) -> Encoded:
        """Pieces as tokens, out of the tokens of the first, of the first two, and so on."""
        ids = prompt = grown[0]
        spoken: list[bool] = []
        for piece, longer in zip(pieces[1:], grown[1:], strict=True):
            ids = longer if longer[: len(ids)] == ids else ids + self._apart(piece.text)
            part = ids[len(prompt) + len(spoken) :]
            spoken += [piece.spoken] * len(part)
            if piece.spoken and not end and (silent := self._after_the_end(part)):
                spoken[-silent:] = [False] * silent
        if end and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids = [*ids, self.tokenizer.eos_token_id]
            spoken.append(True)
        return Encoded(self.row(prompt), self.row(ids[len(prompt) :]), tuple(spoken))

    @functools.cached_property
    def _numbers(self) -> list[int]:
        return list(range(len(self.tokenizer)))

    def row(self, ids: list[int]) -> Row:
        """Tokens as a tuple that shares its numbers with all others: 8 bytes a token instead of 36."""
        return tuple(map(self._numbers.__getitem__, ids))

    def _apart(self, text: str) -> list[int]:
        anchor, anchored, alone = self._ids([ANCHOR, ANCHOR + text, text], False)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else alone

    def _after_the_end(self, ids: list[int]) -> int:
        """How many tokens of white space stand after the last special token of a turn."""
        last = next((i for i in reversed(range(len(ids))) if ids[i] in self._special), None)
        if last is None or self.tokenizer.decode(ids[last + 1 :]).strip():
            return 0
        return len(ids) - last - 1


def _rewrites(number: int) -> str:
    return (
        f"up to message {number}, the chat template renders the conversation otherwise than when it goes on (some "
        "leave out earlier thoughts); give conversations with one answer, or a template with {% generation %} tags"
    )

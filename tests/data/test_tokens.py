"""Boundaries between prompts and completions, in tokens."""

from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidfire_jax.data.formats import Conversation, Plain
from rapidfire_jax.data.tokens import Encoded, Encoder
from rapidfire_jax.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # leaves out what earlier answers say before </think>
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# SmolLM2 has no tokens for the bytes of control characters and of the planes beyond.
TEXTS = st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc"]) | st.just("\n"), max_size=30)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


TURNS = [
    {"role": "system", "content": "Be brief."},
    user("Why?"),
    assistant("So.\n"),
    user("And?"),
    assistant("Ünd 🙂"),
]


def encode(tokenizer: Any, exchange: Any) -> Encoded:
    return Encoder(tokenizer).encode_exchanges([exchange], ["here"])[0]


def spoken(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The texts of runs of spoken tokens."""
    runs: list[list[int]] = []
    before = False
    for token, flag in zip(encoded.completion, encoded.spoken, strict=True):
        if flag and not before:
            runs.append([])
        if flag:
            runs[-1].append(token)
        before = flag
    return [tokenizer.decode(run) for run in runs]


@pytest.fixture
def templated(smollm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(template: str | None) -> Any:
        monkeypatch.setattr(smollm, "chat_template", template)
        return smollm

    return use


@settings(deadline=None, max_examples=60)
@given(TEXTS, TEXTS)
def test_prompts_are_those_of_a_rollout_and_no_text_is_lost(
    smollm: Any, tokenizer: Any, prompt: str, answer: str
) -> None:
    for each in (smollm, tokenizer):
        encoded = encode(each, Plain(prompt, answer))
        assert list(encoded.prompt) == each(prompt)["input_ids"]
        assert encoded.completion[-1] == each.eos_token_id
        assert encoded.spoken == (True,) * len(encoded.completion)
        start = "" if each is smollm else "<s>"
        assert each.decode(encoded.prompt + encoded.completion[:-1]) == start + prompt + answer


@pytest.mark.parametrize(
    ("prompt", "answer", "pieces"),
    [
        ("The film was", " good", [" good"]),
        ("The film was ", "good", ["good"]),  # " good" is one token, the prompt's last space another
        ("Two\n", "\nlines", ["\n", "lines"]),
        ("", "Good film", ["Good", " film"]),
        ("It is a", "nd", ["nd"]),
    ],
)
def test_where_a_token_would_cross_the_boundary(smollm: Any, prompt: str, answer: str, pieces: list[str]) -> None:
    encoded = encode(smollm, Plain(prompt, answer))
    assert [smollm.decode(token) for token in encoded.completion] == [*pieces, "<|im_end|>"]


def test_a_tokenizer_that_puts_a_space_before_texts() -> None:
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["</s>", "▁", "\n", "▁g", *"abcdefghijklmnopqrstuvwxyz"])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[("▁", "g")]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    for prompt, answer in (("was ", "good"), ("was", " good"), ("was\n", "good")):
        encoded = encode(tokenizer, Plain(prompt, answer))
        assert list(encoded.prompt) == tokenizer(prompt)["input_ids"]
        assert tokenizer.decode(encoded.prompt + encoded.completion[:-1]) == prompt + answer


def test_a_tokenizer_that_ends_texts_itself(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    post = tokenizers.processors.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", [("<s>", 0), ("</s>", 1)])
    monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", post)
    encoded = encode(tokenizer, Plain("a", "b"))
    assert tokenizer.decode(encoded.prompt) == "<s>a"
    assert tokenizer.decode(encoded.completion) == "b</s>"


def test_an_end_that_is_there_is_not_doubled(smollm: Any) -> None:
    assert smollm.decode(encode(smollm, Plain("a", "b<|im_end|>")).completion) == "b<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, FORGETFUL])
def test_conversations(templated: Any, template: str) -> None:
    tokenizer = templated(template)
    encoded = encode(tokenizer, Conversation(TURNS, 2))
    assert tokenizer.decode(encoded.prompt) == tokenizer.apply_chat_template(
        TURNS[:2], tokenize=False, add_generation_prompt=True
    )
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(encoded.prompt + encoded.completion) == whole
    assert list(encoded.prompt + encoded.completion) == tokenizer(whole)["input_ids"]
    assert spoken(tokenizer, encoded) == ["So.\n<|im_end|>", "Ünd 🙂<|im_end|>"]
    assert encoded.spoken[-1] is False  # the line break after <|im_end|>
    last = encode(tokenizer, Conversation(TURNS, 4))
    assert last.prompt + last.completion == encoded.prompt + encoded.completion
    assert spoken(tokenizer, last) == ["Ünd 🙂<|im_end|>"]


def test_a_line_break_after_the_header_stays_with_the_prompt(templated: Any) -> None:
    tokenizer = templated(CHATML)
    encoded = encode(tokenizer, Conversation([user("Why?"), assistant("\nSo")], 1))
    assert tokenizer.decode(encoded.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(encoded.completion) == "\nSo<|im_end|>\n"


def test_templates_without_an_end_of_turn(tokenizer: Any) -> None:
    encoded = encode(tokenizer, Conversation(TURNS, 2))
    assert spoken(tokenizer, encoded) == ["So.\n\n", "Ünd 🙂\n"]


def test_marks_agree_with_prefixes(templated: Any) -> None:
    plain, marked = [], []
    for start in (2, 4):
        tokenizer = templated(CHATML)
        plain.append(encode(tokenizer, Conversation(TURNS, start)))
        assert not Encoder(tokenizer).has_generation_tags()
        encoder = Encoder(templated(MARKED))
        assert encoder.has_generation_tags()
        marked.append(encoder.encode_marked(Conversation(TURNS, start), "here"))
    for one, other in zip(plain, marked, strict=True):
        assert other.prompt == ()
        assert other.completion == one.prompt + one.completion
        assert other.spoken == (False,) * len(one.prompt) + one.spoken


@pytest.mark.parametrize(
    ("template", "messages", "start", "said"),
    [
        (
            FORGETFUL,
            [user("a"), assistant("x</think>b"), user("c"), assistant("d")],
            1,
            "up to message 1, the chat templ",
        ),
        (CHATML, [assistant("b")], 0, "begins with a message of the assistant"),
        (
            None,
            [user("a"), assistant("b")],
            1,
            "messages need a chat template, and the tokenizer of this model has none",
        ),
        ("{{ raise_exception('roles must alternate') }}", TURNS, 2, "refuses the messages: roles must alternate"),
        ("{{ messages[0]['content'] + messages[0]['name'] }}", TURNS, 2, "refuses the messages"),
    ],
)
def test_says_what_is_wrong(templated: Any, template: str | None, messages: Any, start: int, said: str) -> None:
    with pytest.raises(InputError, match=f"here: .*{said}"):
        encode(templated(template), Conversation(messages, start))


def test_forgetful_templates_serve_single_answers(templated: Any) -> None:
    tokenizer = templated(FORGETFUL)
    encoded = encode(tokenizer, Conversation([user("a"), assistant("x</think>b")], 1))
    assert spoken(tokenizer, encoded) == ["x</think>b<|im_end|>"]

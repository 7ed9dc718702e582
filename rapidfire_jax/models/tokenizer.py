"""Tokenizers: a Hugging Face folder through transformers, or the byte-level BPE inside a GGUF file."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.gguf import read_gguf
from rapidfire_jax.models.sources import gguf_file, read_json, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How text is cut before BPE: by each expression in turn; what matches and what lies between become pieces.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (WORDS,),
    "smollm": (r"\p{N}", WORDS),
    "llama-bpe": (_TIKTOKEN % "{1,3}",),
    "qwen2": (_TIKTOKEN % "",),
}
CONTROL, USER_DEFINED = 3, 4  # codes in tokenizer.ggml.token_type


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a model named as for `FlaxAutoModelForCausalLM`. It pads on the left.

    Raises:
      InputError: no tokenizer there, one of an unknown kind, or one without an end-of-sequence token.
    """
    path = resolve(name)
    found = gguf_file(path)
    tokenizer = _from_folder(path) if found is None else _from_gguf(found)
    if tokenizer.eos_token is None:
        fix = (
            path / "tokenizer_config.json, key eos_token" if found is None else f"{found}, tokenizer.ggml.eos_token_id"
        )
        raise InputError(f"{name}: the tokenizer has no end-of-sequence token; set it in {fix}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def stop_ids(name: str, tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's end of sequence, and those in the model's `generation_config.json`.

    Raises:
      InputError: the file names something that is not a token.
    """
    file = resolve(name) / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [] if named is None else [named])]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(tokenizer):
            raise InputError(f"{file}: eos_token_id={named!r}; expected ids below {len(tokenizer)}")
    return tuple(dict.fromkeys(ids))


def check_vocabulary(name: str, vocab_size: int, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuses a model with fewer embeddings than the tokenizer has tokens; more of them are padding.

    Raises:
      InputError: naming both numbers.
    """
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {vocab_size} embeddings; the tokenizer "
            "belongs to another model"
        )


def _transformers() -> Any:
    """transformers, imported on first use because it takes seconds, without its advice to install PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _from_folder(folder: Path) -> "PreTrainedTokenizerFast":
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing more special for a broken tokenizer.json
        raise InputError(f"{folder}: holds no tokenizer that can be read: {error}") from None


def _from_gguf(path: Path) -> "PreTrainedTokenizerFast":
    metadata = {key.removeprefix("tokenizer."): value for key, value in read_gguf(path).metadata.items()}
    kind, cut = metadata.get("ggml.model"), metadata.get("ggml.pre", "default")
    if kind != "gpt2":
        raise InputError(f"{path}: tokenizer model {kind!r} is not supported; known: gpt2 (byte-level BPE)")
    if cut not in PRE_TOKENIZERS:
        raise InputError(f"{path}: pre-tokenizer {cut!r} is not supported; known: {', '.join(PRE_TOKENIZERS)}")
    try:
        tokens = metadata["ggml.tokens"]
        backend = _byte_level_bpe(tokens, metadata["ggml.merges"], metadata.get("ggml.token_type", []), cut)
    except KeyError as error:
        raise InputError(f"{path}: metadata key 'tokenizer.{error.args[0]}' is missing") from None
    except Exception as error:  # the class that tokenizers raises for merges of unknown tokens
        raise InputError(f"{path}: tokens and merges do not fit together: {error}") from None

    def token(role: str) -> str | None:
        number = metadata.get(f"ggml.{role}_token_id")
        if number is not None and number >= len(tokens):
            raise InputError(f"{path}: tokenizer.ggml.{role}_token_id is {number}, but there are {len(tokens)} tokens")
        return None if number is None else tokens[number]

    if metadata.get("ggml.add_bos_token") and (bos := token("bos")) is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos"),
        eos_token=token("eos"),
        pad_token=token("padding"),
        unk_token=token("unknown"),
        chat_template=metadata.get("chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _byte_level_bpe(tokens: list[str], merges: list[str], token_types: list[int], cut: str) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF vocabulary; the id of a token is its place in `tokens`."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
    # Llama 3 takes a word that is in the vocabulary whole, whatever the merges would make of it.
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=cut == "llama-bpe"))
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(tokenizers.Regex(cutter), "isolated") for cutter in PRE_TOKENIZERS[cut]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=code == CONTROL, normalized=False)
            for token, code in zip(tokens, token_types, strict=False)
            if code in (CONTROL, USER_DEFINED)
        ]
    )
    return backend

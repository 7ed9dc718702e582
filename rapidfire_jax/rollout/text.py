"""Text in, text out."""

from collections.abc import Sequence

import jax
import numpy as np

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.auto import load_language_model
from rapidfire_jax.models.tokenizer import check_vocabulary, load_tokenizer, stop_ids
from rapidfire_jax.rollout.generate import SamplingConfig, generate


def generate_text(
    name: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    adapter: str | None = None,
) -> list[str]:
    """Loads a model and returns its response to each prompt; `temperature=0` takes the most likely token.

    The model computes in what the hardware multiplies best. `adapter` names a `peft` folder or repository to merge into
    it.

    Raises:
      InputError: an empty prompt, one longer than the context, or a model that cannot be loaded.
    """
    model = load_language_model(name, adapter=adapter, dtype=None)
    tokenizer = load_tokenizer(name)
    check_vocabulary(name, model.config.vocab_size, tokenizer)
    if chat and tokenizer.chat_template is None:
        raise InputError(f"{name}: the tokenizer has no chat template")
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        if chat
        else p
        for p in prompts
    ]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    room = model.config.max_positions - max_new_tokens
    for prompt, row in zip(prompts, rows, strict=True):
        if not 0 < len(row) <= room:
            shown = prompt if len(prompt) < 60 else prompt[:57] + "..."
            raise InputError(
                f"prompt {shown!r} has {len(row)} tokens; accepted: 1 to {room} "
                f"(context {model.config.max_positions} less {max_new_tokens} new tokens)"
            )
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int32)
    mask = np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, True
    config = SamplingConfig(
        max_new_tokens, stop_ids(name, tokenizer), top_k=top_k, top_p=top_p, greedy=temperature == 0
    )
    run = jax.jit(generate, static_argnames="config")
    out = run(model, ids, mask, jax.random.key(seed), temperature or 1.0, config=config)
    tokens, mask_t = np.asarray(out.tokens)[:, longest:], np.asarray(out.mask_t)
    return tokenizer.batch_decode(
        [t[m].tolist() for t, m in zip(tokens, mask_t, strict=True)], skip_special_tokens=True
    )

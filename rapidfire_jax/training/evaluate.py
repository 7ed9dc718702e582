"""Reward, KL, length and variety of a policy's responses to the held-out prompts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rapidfire_jax.data.prompts import PromptSet, pad_batch
from rapidfire_jax.rewards.base import Reward


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float:
    """Number of different n-grams over the number of all n-grams, of all responses together; 0 without any.

    References:
      Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models, 2016.
    """
    grams = [tuple(row[i : i + n]) for row in responses for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def evaluate_policy(
    sample: Callable[..., Any],
    reference: Callable[..., Any],
    prompts: PromptSet,
    reward: Reward,
    tokenizer: Any,
    key: jax.Array,
    *,
    batch_size: int,
    buckets: Sequence[int],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Samples one response a prompt, in batches of a fixed size so that training's programs serve here too.

    Args:
      sample: `(ids, mask, key) -> rollouts`.
      reference: `rollouts -> ref_logp_t`.

    Returns:
      `{"reward", "kl", "response_length", "distinct_2"}` (KL in nats a response, length in tokens), and one record a
      prompt with its response, reward and KL.
    """
    size = len(prompts.texts)
    responses: list[list[int]] = []
    kls: list[float] = []
    for start in range(0, size, batch_size):
        rows = [
            i % size for i in range(start, start + batch_size)
        ]  # the last batch is filled up with prompts seen before
        ids, mask = pad_batch([prompts.tokens[i] for i in rows], buckets, pad_id=0)
        rollouts = sample(ids, mask, jax.random.fold_in(key, start))
        log_ratio = np.asarray(rollouts.old_logp_t - reference(rollouts))
        kl = np.where(rollouts.mask_t, log_ratio, 0.0).sum(axis=1)
        wanted = min(batch_size, size - start)
        responses += response_tokens(rollouts)[:wanted]
        kls += kl[:wanted].tolist()
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    scores = reward(list(prompts.texts), texts, prompts.columns).total
    metrics = {
        "reward": float(np.mean(scores)),
        "kl": float(np.mean(kls)),
        "response_length": float(np.mean([len(r) for r in responses])),
        "distinct_2": distinct_n(responses, 2),
    }
    records = [
        {"prompt": prompt, "response": text, "reward": float(score), "kl": kl}
        for prompt, text, score, kl in zip(prompts.texts, texts, scores, kls, strict=True)
    ]
    return metrics, records


def response_tokens(rollouts: Any) -> list[list[int]]:
    """Token ids of each response, up to and including EOS."""
    mask_t = np.asarray(rollouts.mask_t)
    tokens = np.asarray(rollouts.tokens)[:, -mask_t.shape[1] :]
    return [row[mask].tolist() for row, mask in zip(tokens, mask_t, strict=True)]

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


def win_rate(samples: list[dict[str, Any]], score: str) -> float:
    """Share of prompts whose sample of the phase "after" scores higher than that of "before"; a tie is half a win."""
    scores = {phase: [sample[score] for sample in samples if sample["phase"] == phase] for phase in ("before", "after")}
    before, after = np.array(scores["before"]), np.array(scores["after"])
    return float(np.mean((after > before) + 0.5 * (after == before)))


def evaluate_policy(
    sample: Callable[..., Any],
    reference: Callable[..., Any],
    prompts: PromptSet,
    reward: Reward,
    judge: Reward | None,
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
      prompts: those held out.
      reward: what the policy is trained on.
      judge: a second opinion.
      tokenizer: of the policy.
      key: the same key gives the same responses.
      batch_size, buckets: as in training.

    Returns:
      `{"reward", "kl", "response_length", "distinct_2"}` (KL in nats a response, length in tokens), "judge" where there
      is one, and one record a prompt with its response and these numbers.
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
    opinions = {"reward": reward} if judge is None else {"reward": reward, "judge": judge}
    scores = {
        name: opinion(list(prompts.texts), texts, prompts.columns, responses).overall
        for name, opinion in opinions.items()
    }
    metrics = {
        "reward": float(np.mean(scores["reward"])),
        "kl": float(np.mean(kls)),
        "response_length": float(np.mean([len(r) for r in responses])),
        "distinct_2": distinct_n(responses, 2),
    }
    if judge is not None:
        metrics["judge"] = float(np.mean(scores["judge"]))
    records = [
        {"prompt": prompt, "response": text}
        | {name: float(values[i]) for name, values in scores.items()}
        | {"kl": kls[i]}
        for i, (prompt, text) in enumerate(zip(prompts.texts, texts, strict=True))
    ]
    return metrics, records


def response_tokens(rollouts: Any) -> list[list[int]]:
    """Token ids of each response, up to and including EOS."""
    mask_t = np.asarray(rollouts.mask_t)
    tokens = np.asarray(rollouts.tokens)[:, -mask_t.shape[1] :]
    return [row[mask].tolist() for row, mask in zip(tokens, mask_t, strict=True)]

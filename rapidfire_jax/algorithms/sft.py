"""Supervised fine-tuning: maximum likelihood of given completions.

References: Ouyang et al., Training Language Models to Follow Instructions with Human Feedback, 2022, sec. 3.5.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from rapidfire_jax.algorithms import offline
from rapidfire_jax.algorithms.binding import bind
from rapidfire_jax.algorithms.masking import Aggregation, Mean, PartialMetrics, aggregate, masked_sum
from rapidfire_jax.algorithms.offline import CompletionBatch


@dataclasses.dataclass(frozen=True)
class SFTConfig(offline.OfflineConfig):
    """What fixes the shape of the computation. Static under jit."""

    aggregation: Aggregation = "token"
    packing: bool = True  # several examples a row
    completion_only: bool = True  # prompts have no loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SFTHParams(offline.OfflineHParams):
    """Numbers that may change between calls without a new compilation; vmap over them for a sweep."""


def next_token_mask(trained: Bool[Array, "B S"], segments: Int[Array, "B S"]) -> Bool[Array, "B T"]:
    """Which of the last T = S - 1 tokens count: those trained that have a token of their own example before them."""
    return trained[:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def sft_loss(
    logp_t: Float[Array, "B T"], mask_t: Bool[Array, "B T"], aggregation: Aggregation = "token"
) -> tuple[Float[Array, ""], Float[Array, ""], PartialMetrics]:
    """Negative log-likelihood as `(sum, count, metrics)`; the gradient flows to `logp_t` where `mask_t`.

    Args:
      logp_t: nats.
      mask_t: True on tokens that count.
      aggregation: see `rapidfire_jax.algorithms.masking.aggregate`.
    """
    total, count = aggregate(-logp_t, mask_t, aggregation)
    nll, tokens = masked_sum(-jax.lax.stop_gradient(logp_t), mask_t)
    return total, count, {"nll": Mean(nll, tokens)}


def sft_objective(
    frozen: Any, trainable: Any, batch: CompletionBatch, hparams: SFTHParams, config: SFTConfig, model: Any
) -> tuple[Float[Array, ""], Float[Array, ""], PartialMetrics]:
    """`sft_loss` of a batch under a policy."""
    inputs = model.encode(frozen, batch.tokens, batch.segments)
    outputs = model.apply(frozen, trainable, inputs, batch.tokens.shape[1] - 1, 1.0)
    return sft_loss(outputs.logp_t, next_token_mask(batch.trained, batch.segments), config.aggregation)


ALGORITHM = offline.OfflineAlgorithm(SFTConfig, SFTHParams, sft_objective, ("completions",), "policy", "sft")

sft_step = bind(offline.step, ALGORITHM, "sft_step")

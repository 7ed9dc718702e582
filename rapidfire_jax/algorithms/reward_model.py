"""Reward modelling: a score of responses from preferences, or of texts from labels.

References: Stiennon et al., Learning to Summarize with Human Feedback, 2020; Touvron et al., Llama 2, 2023, sec. 3.2.2
(margin); Eisenstein et al., Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking,
2023, sec. 2 (centre regularisation).
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from rapidfire_jax.algorithms import offline
from rapidfire_jax.algorithms.binding import bind
from rapidfire_jax.algorithms.masking import Mean, PartialMetrics
from rapidfire_jax.algorithms.offline import LabelledBatch, PreferenceBatch, counted, only
from rapidfire_jax.algorithms.online import NonNegative


@dataclasses.dataclass(frozen=True)
class RewardModelConfig(offline.OfflineConfig):
    """What fixes the shape of the computation. Static under jit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardModelHParams(offline.OfflineHParams):
    """Numbers that may change between calls without a new compilation; vmap over them for a sweep."""

    margin_coef: NonNegative = 0.0  # of the margins in the data, as far as scores are to be apart
    centre_coef: NonNegative = 0.0  # pulls the scores of a pair towards a mean of 0


def preference_loss(
    score: Float[Array, "B 2"],
    margin: Float[Array, " B"],
    hparams: RewardModelHParams,
    valid: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], PartialMetrics]:
    """Bradley-Terry loss of pairs as `(sum, count, metrics)`:

        -log s(chosen - rejected - margin_coef margin) + centre_coef (chosen + rejected)^2,  s the logistic function

    Args:
      score: of the chosen and of the rejected response; gradients flow to it.
      margin: how much better the chosen one is; a constant.
      hparams: the coefficients.
      valid: pairs that count; None: all.

    References:
      Stiennon et al. 2020, eq. 1; Touvron et al. 2023, eq. 2; Eisenstein et al. 2023, eq. 3.
    """
    score, margin = only(score, valid), only(margin, valid)
    difference = score[:, 0] - score[:, 1]
    centre = hparams.centre_coef * (score[:, 0] + score[:, 1]) ** 2
    loss = -jax.nn.log_sigmoid(difference - hparams.margin_coef * margin) + centre
    still = jax.lax.stop_gradient(score)
    averages = {
        "accuracy": (difference > 0).astype(score.dtype),
        "margin": still[:, 0] - still[:, 1],
        "score": still.mean(axis=1),
    }
    return *counted(loss, valid), {name: Mean(*counted(values, valid)) for name, values in averages.items()}


def classification_loss(
    score: Float[Array, " B"], label: Float[Array, " B"], valid: Bool[Array, " B"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], PartialMetrics]:
    """Cross entropy of texts as `(sum, count, metrics)`: `-label log s(score) - (1 - label) log s(-score)`.

    Args:
      score: log-odds of the class; gradients flow to it.
      label: 1 for the class, 0 for the other, or a probability.
      valid: texts that count; None: all.
    """
    score, label = only(score, valid), only(label, valid)
    loss = -label * jax.nn.log_sigmoid(score) - (1.0 - label) * jax.nn.log_sigmoid(-score)
    averages = {
        "accuracy": ((score > 0) == (label > 0.5)).astype(score.dtype),
        "score": jax.lax.stop_gradient(score),
    }
    return *counted(loss, valid), {name: Mean(*counted(values, valid)) for name, values in averages.items()}


def reward_model_objective(
    frozen: Any,
    trainable: Any,
    batch: PreferenceBatch | LabelledBatch,
    hparams: RewardModelHParams,
    config: RewardModelConfig,
    model: Any,
) -> tuple[Float[Array, ""], Float[Array, ""], PartialMetrics]:
    """`preference_loss` or `classification_loss`, as the batch has pairs or labels."""
    if isinstance(batch, LabelledBatch):
        score = model.apply(frozen, trainable, batch.tokens, batch.attention_mask)
        return classification_loss(score, batch.label, batch.attention_mask.any(axis=1))
    tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.attention_mask))
    score = model.apply(frozen, trainable, tokens, mask).reshape(-1, 2)
    return preference_loss(score, batch.margin, hparams, batch.mask_t.any(axis=(1, 2)))


ALGORITHM = offline.OfflineAlgorithm(
    RewardModelConfig,
    RewardModelHParams,
    reward_model_objective,
    ("preferences", "labelled"),
    "reward_model",
    "reward_model",
)

reward_model_step = bind(offline.step, ALGORITHM, "reward_model_step")

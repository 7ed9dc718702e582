"""Learning from data that exist already: what SFT, reward modelling and DPO share.

    step       one optimiser step on a batch
    evaluate   the same objective without a step

An algorithm is an `OfflineAlgorithm`: its objective, and which examples and which kind of model it wants. Models enter
as objects with callables: a policy with `encode`, `apply` and `reference` as in `rapidfire_jax.algorithms.online`, or a
reward model with

    apply(frozen, trainable, tokens, attention_mask) -> score  [B]
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from annotated_types import Gt
from jaxtyping import Array, Bool, Float, Int

from rapidfire_jax.algorithms.masking import Mean, Metrics, PartialMetrics, masked_sum
from rapidfire_jax.algorithms.online import ELSEWHERE, NonNegative
from rapidfire_jax.algorithms.train_state import TrainState, gradient_step


@dataclasses.dataclass(frozen=True)
class OfflineConfig:
    """What fixes the shape of the computation. Static under jit."""

    batch_size: Annotated[int, Gt(0)] = 16  # rows (sft), pairs or texts an optimiser step
    micro_batches: Annotated[int, Gt(0)] = 1  # parts of a batch whose gradients are added up


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfflineHParams:
    """Numbers that may change between calls without a new compilation; vmap over them for a sweep."""

    learning_rate: NonNegative = dataclasses.field(default=1e-5, metadata=ELSEWHERE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompletionBatch:
    """B rows of S tokens, each one example or several packed ones."""

    tokens: Int[Array, "B S"]
    segments: Int[Array, "B S"]  # number of the example in its row, from 1; 0 at padding
    trained: Bool[Array, "B S"]  # True on tokens that count in the loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceBatch:
    """B pairs, the chosen response first: a prompt padded on the left, then T response tokens.

    A pair without any response token fills up a batch and does not count.
    """

    tokens: Int[Array, "B 2 S"]
    attention_mask: Bool[Array, "B 2 S"]
    mask_t: Bool[Array, "B 2 T"]  # True on response tokens
    margin: Float[Array, " B"]  # by how much the chosen one is better; 0 where the data do not say


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelledBatch:
    """B texts with labels; one without any token fills up a batch and does not count."""

    tokens: Int[Array, "B S"]
    attention_mask: Bool[Array, "B S"]
    label: Float[Array, " B"]  # probability that the text is of the class: 0, 1 or between


def only(x: Float[Array, " B *N"], valid: Bool[Array, " B"] | None) -> Float[Array, " B *N"]:
    """`x`, and 0 in the rows that are not `valid`: what stands there has neither effect nor gradient."""
    return x if valid is None else jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)


def counted(values: Float[Array, " B"], valid: Bool[Array, " B"] | None) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(sum, count)` of `values` over the rows that are `valid`; None: over all."""
    return masked_sum(values, jnp.ones(values.shape, bool) if valid is None else valid)


@dataclasses.dataclass(frozen=True)
class OfflineAlgorithm:
    """What makes one algorithm, and its section of a run's configuration."""

    config: type[OfflineConfig]
    hparams: type[OfflineHParams]
    objective: Callable[..., tuple[Array, Array, PartialMetrics]]  # (frozen, trainable, batch, hparams, config, model)
    examples: tuple[Literal["completions", "preferences", "labelled"], ...]  # accepted
    model: Literal["policy", "reward_model"]
    section: str
    online: ClassVar[bool] = False


def step(
    algorithm: OfflineAlgorithm,
    state: TrainState,
    batch: Any,
    hparams: Any,
    *,
    model: Any,
    optimizer: optax.GradientTransformation,
    config: Any,
) -> tuple[TrainState, Metrics]:
    """One optimiser step on one batch.

    Args:
      algorithm: whose objective.
      state: gradients are taken for `state.trainable` alone.
      batch: see the algorithm; its rows must be a multiple of `config.micro_batches`.
      hparams: traced numbers.
      model: an object with the callables of the module: a `Policy` or a `Scorer`.
      optimizer: optax transformation.
      config: static settings.

    Returns:
      The new state, and metrics of the batch before the step.
    """

    def loss(trainable, part):
        return algorithm.objective(state.frozen, trainable, part, hparams, config, model)

    rates = {"learning_rate": hparams.learning_rate, "critic_learning_rate": hparams.learning_rate}
    return gradient_step(state, batch, loss, optimizer=optimizer, rates=rates, micro_batches=config.micro_batches)


def evaluate(
    algorithm: OfflineAlgorithm, state: TrainState, batch: Any, hparams: Any, *, model: Any, config: Any
) -> PartialMetrics:
    """Metrics of a batch, `loss` among them, as sums and counts: add those of several batches, then `finish`."""
    total, count, metrics = algorithm.objective(state.frozen, state.trainable, batch, hparams, config, model)
    return metrics | {"loss": Mean(total, count)}

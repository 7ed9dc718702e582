"""What a training step changes, and the step that all algorithms share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from rapidfire_jax.algorithms.masking import Mean, Metrics, PartialMetrics, finish, wide
from rapidfire_jax.algorithms.reward_shaping import RunningStats, init_stats

type Loss = Callable[[Any, Any], tuple[Array, Array, PartialMetrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes, and the frozen weights beside it."""

    frozen: Any
    trainable: Any
    opt_state: Any
    step: Int[Array, ""]  # optimiser steps taken
    stats: RunningStats = dataclasses.field(default_factory=init_stats)


def init_state(frozen: Any, trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(frozen, trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))


def gradient_step(
    state: TrainState,
    batch: Any,
    loss: Loss,
    *,
    optimizer: optax.GradientTransformation,
    rates: dict[str, Any],
    micro_batches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One optimiser step on `sum / count` of the loss over a batch.

    With several micro-batches, sums of gradients and counts are added up, one micro-batch at a time, and divided once:
    the step is that of the whole batch, however unequal the micro-batches are in tokens.

    Args:
      state: gradients are taken for `state.trainable` alone.
      batch: a pytree of arrays with equally many rows.
      loss: `(trainable, batch) -> (sum, count, metrics)`.
      optimizer: optax transformation; `rates` are passed to it.
      rates: `learning_rate` and `critic_learning_rate`. An optimiser of `make_optimizer` follows them; any other keeps
        the rate it was made with.
      micro_batches: divides the number of rows.

    Returns:
      The new state, and the metrics of the whole batch before the step, `loss/total` and `policy/gradient_norm` among
      them.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % micro_batches:
        raise ValueError(f"{rows} rows cannot be cut into {micro_batches} equal micro-batches")

    def per_row(trainable, part):
        """The sum, scaled by a constant so that gradients in half precision neither overflow nor vanish."""
        total, count, metrics = loss(trainable, part)
        return total / rows, (count, metrics | {"loss/total": Mean(total, count)})

    gradient = jax.grad(per_row, has_aux=True)
    if micro_batches == 1:
        gradients, (count, metrics) = gradient(state.trainable, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(micro_batches, rows // micro_batches, *x.shape[1:]), batch)

        def add(summed, part):
            gradients, aux = gradient(state.trainable, part)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), summed, gradients), aux

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, wide(w.dtype)), state.trainable)
        gradients, (counts, metrics) = jax.lax.scan(add, zeros, parts)
        gradients = jax.tree.map(lambda g, w: g.astype(w.dtype), gradients, state.trainable)
        count = counts.sum()
    scale = rows / jnp.maximum(count, 1.0)
    gradients = jax.tree.map(lambda g: (g.astype(scale.dtype) * scale).astype(g.dtype), gradients)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float and int32 in Adam's bias correction
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            gradients, state.opt_state, state.trainable, **rates
        )
    trainable = optax.apply_updates(state.trainable, updates)
    new = dataclasses.replace(state, trainable=trainable, opt_state=opt_state, step=state.step + 1)
    return new, finish(metrics) | {"policy/gradient_norm": optax.tree.norm(gradients)}

"""What a training step changes, and the step that all algorithms share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from rapidfire_jax.algorithms.loss_scale import LossScale, all_finite
from rapidfire_jax.algorithms.masking import Mean, Metrics, PartialMetrics, finish, wide
from rapidfire_jax.algorithms.optimizer import take_step
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
    loss_scale: LossScale | None = None  # of models that compute in float16


def init_state(
    frozen: Any, trainable: Any, optimizer: optax.GradientTransformation, loss_scale: LossScale | None = None
) -> TrainState:
    """State before the first step; `loss_scale` comes from `init_loss_scale`."""
    step = jnp.zeros((), jnp.int32)
    return TrainState(frozen, trainable, optimizer.init(trainable), step, loss_scale=loss_scale)


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

    With a loss scale, a step whose loss or gradient is not finite is skipped: parameters, optimiser state and step
    counter stay bit for bit what they were.

    Args:
      state: gradients are taken for `state.trainable` alone.
      batch: a pytree of arrays with equally many rows.
      loss: `(trainable, batch) -> (sum, count, metrics)`.
      optimizer: optax transformation, whose own `step` is taken if it has one; `rates` are passed to it.
      rates: `learning_rate` and `critic_learning_rate`. An optimiser of `make_optimizer` follows them; any other keeps
        the rate it was made with.
      micro_batches: divides the number of rows.

    Returns:
      The new state, and the metrics of the whole batch before the step, `loss/total` and `policy/gradient_norm` among
      them. With a loss scale also `precision/loss_scale`, that of this step, and `precision/skipped_steps`, with this
      one; the gradient norm of a step that is skipped is NaN.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % micro_batches:
        raise ValueError(f"{rows} rows cannot be cut into {micro_batches} equal micro-batches")

    def per_row(trainable, part):
        """The sum, scaled by a constant so that gradients in half precision neither overflow nor vanish."""
        total, count, metrics = loss(trainable, part)
        scaled = total / rows
        if state.loss_scale is not None:
            scaled *= state.loss_scale.scale.astype(scaled.dtype)
        return scaled, (count, metrics | {"loss/total": Mean(total, count)})

    gradient = jax.grad(per_row, has_aux=True)
    if micro_batches == 1:
        gradients, (count, partial) = gradient(state.trainable, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(micro_batches, rows // micro_batches, *x.shape[1:]), batch)

        def add(summed, part):
            gradients, aux = gradient(state.trainable, part)
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), summed, gradients), aux

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, wide(w.dtype)), state.trainable)
        gradients, (counts, partial) = jax.lax.scan(add, zeros, parts)
        gradients = jax.tree.map(lambda g, w: g.astype(w.dtype), gradients, state.trainable)
        count = counts.sum()
    scale = rows / jnp.maximum(count, 1.0)
    if state.loss_scale is not None:
        scale /= state.loss_scale.scale.astype(scale.dtype)
    # Not of the scaled gradients: XLA would keep their squares, which Adam wants as well.
    norm = scale * optax.tree.norm(jax.tree.map(lambda g: g.astype(scale.dtype), gradients))
    gradients = jax.tree.map(lambda g: (g.astype(scale.dtype) * scale).astype(g.dtype), gradients)
    metrics = finish(partial) | {"policy/gradient_norm": norm}

    def take(trainable, opt_state):
        return take_step(optimizer, gradients, opt_state, trainable, **rates)

    if state.loss_scale is None:
        trainable, opt_state = take(state.trainable, state.opt_state)
        return dataclasses.replace(state, trainable=trainable, opt_state=opt_state, step=state.step + 1), metrics
    finite = all_finite(metrics["loss/total"], *jax.tree.leaves(gradients))
    trainable, opt_state = jax.lax.cond(finite, take, lambda *old: old, state.trainable, state.opt_state)
    step, after = state.step + finite.astype(jnp.int32), state.loss_scale.after(finite)
    new = dataclasses.replace(state, trainable=trainable, opt_state=opt_state, step=step, loss_scale=after)
    return new, metrics | {
        "policy/gradient_norm": jnp.where(finite, metrics["policy/gradient_norm"], jnp.nan),
        "precision/loss_scale": state.loss_scale.scale,
        "precision/skipped_steps": after.skipped.astype(jnp.float32),
    }

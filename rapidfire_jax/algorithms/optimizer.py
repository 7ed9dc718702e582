"""The optimiser, with the learning rate as an argument of every update instead of a constant inside."""

from typing import Literal

import jax
import optax


def make_optimizer(
    name: Literal["adamw", "sgd"],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping, then AdamW or SGD; `update(..., learning_rate=...)` takes the rate, which may be traced."""
    direction = {"adamw": optax.scale_by_adam(*betas, eps=eps), "sgd": optax.identity()}
    clip = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(*clip, direction[name], *decay, _descend())


def _descend() -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, learning_rate, **_):
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

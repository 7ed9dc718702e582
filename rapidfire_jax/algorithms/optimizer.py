"""The optimiser, with the learning rates as arguments of every update instead of constants inside."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax


def make_optimizer(
    name: Literal["adamw", "sgd"],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    is_critic: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping, then AdamW or SGD; `update(..., learning_rate=...)` takes the rate, which may be traced.

    Args:
      name: "adamw" or "sgd".
      betas, eps: of Adam.
      weight_decay: decoupled, times the learning rate.
      max_grad_norm: of all gradients together; None: no clipping.
      is_critic: parameters -> a tree of bools; where True, `critic_learning_rate` is followed instead.
    """
    direction = {"adamw": optax.scale_by_adam(*betas, eps=eps), "sgd": optax.identity()}
    clip = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(*clip, direction[name], *decay, _descend(is_critic))


def separate_optimizers(
    policy: optax.GradientTransformation, critic: optax.GradientTransformation, is_critic: Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """One optimiser for the policy's parameters and one for the critic's; each clips the norm of its own gradients.

    `update(..., learning_rate=..., critic_learning_rate=...)`: each follows its own.

    Args:
      policy, critic: of `make_optimizer`.
      is_critic: parameters -> a tree of bools, made by mapping over what it is given.
    """
    inner = optax.with_extra_args_support(critic)

    def update(updates, state, params=None, *, critic_learning_rate, **_):
        rates = {"learning_rate": critic_learning_rate, "critic_learning_rate": critic_learning_rate}
        return inner.update(updates, state, params, **rates)

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda critic: "critic" if critic else "policy", is_critic(params))

    return optax.partition(
        {"policy": policy, "critic": optax.GradientTransformationExtraArgs(inner.init, update)}, labels
    )


def _descend(is_critic: Callable[[Any], Any] | None) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, learning_rate, critic_learning_rate=None, **_):
        if is_critic is None:
            return jax.tree.map(lambda u: -learning_rate * u, updates), state
        rates = lambda u, critic: -(critic_learning_rate if critic else learning_rate) * u  # noqa: E731
        return jax.tree.map(rates, updates, is_critic(updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

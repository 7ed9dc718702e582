"""The optimiser, with the learning rates as arguments of every update instead of constants inside."""

import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from pallas_kernels import adamw_8bit, init_moments


def make_optimizer(
    name: Literal["adamw", "adamw_8bit", "sgd"],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    is_critic: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping, then AdamW or SGD; `update(..., learning_rate=...)` takes the rate, which may be traced.

    Args:
      name: "adamw", "sgd", or "adamw_8bit", whose state takes about a quarter of the memory of AdamW's.
      betas, eps: of Adam.
      weight_decay: decoupled, times the learning rate.
      max_grad_norm: of all gradients together; None: no clipping.
      is_critic: parameters -> a tree of bools; where True, `critic_learning_rate` is followed instead.
    """
    clip = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    if name == "adamw_8bit":
        return optax.chain(*clip, _adamw_8bit(betas, eps, weight_decay, is_critic))
    direction = {"adamw": optax.scale_by_adam(*betas, eps=eps), "sgd": optax.identity()}
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


class AdamW8bitState(NamedTuple):
    """State of `adamw_8bit`."""

    step: Int[Array, ""]  # steps taken
    moments: Any  # of `Moments`, one a parameter


def _adamw_8bit(
    betas: tuple[float, float], eps: float, weight_decay: float, is_critic: Callable[[Any], Any] | None
) -> optax.GradientTransformationExtraArgs:
    """Its updates are exact differences: adding them gives the parameters that the operation returned.

    bfloat16 parameters are rounded stochastically, with bits that depend on step and place alone.
    """

    def init(params: Any) -> AdamW8bitState:
        return AdamW8bitState(jnp.zeros((), jnp.int32), jax.tree.map(init_moments, params))

    def update(updates, state, params=None, *, learning_rate, critic_learning_rate=None, **_):
        rates = _rates(params, is_critic, learning_rate, critic_learning_rate)
        places = itertools.count()

        def step(param, grad, moments, rate):
            new, moments = adamw_8bit(
                param,
                grad,
                moments,
                step=state.step + 1,
                learning_rate=rate,
                b1=betas[0],
                b2=betas[1],
                eps=eps,
                weight_decay=weight_decay,
                key=jax.random.key(next(places)),
            )
            return new - param, moments

        stepped = jax.tree.map(step, params, updates, state.moments, rates)
        differences, moments = (jax.tree.map(lambda _, pair, i=i: pair[i], params, stepped) for i in (0, 1))
        return differences, AdamW8bitState(state.step + 1, moments)

    return optax.GradientTransformationExtraArgs(init, update)


def _rates(params: Any, is_critic: Callable[[Any], Any] | None, learning_rate: Any, critic_learning_rate: Any) -> Any:
    """The learning rate of each parameter."""
    if is_critic is None:
        return jax.tree.map(lambda _: learning_rate, params)
    return jax.tree.map(lambda critic: critic_learning_rate if critic else learning_rate, is_critic(params))


def _descend(is_critic: Callable[[Any], Any] | None) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, learning_rate, critic_learning_rate=None, **_):
        rates = _rates(updates, is_critic, learning_rate, critic_learning_rate)
        return jax.tree.map(lambda u, rate: -rate * u, updates, rates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

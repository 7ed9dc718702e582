"""The optimiser, with the learning rates as arguments of every update instead of constants inside."""

import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from pallas_kernels import adamw_8bit, init_moments
from rapidfire_jax.errors import InputError


class FusedOptimizer(optax.GradientTransformationExtraArgs):
    """An optax transformation that can also take the whole step: `step(updates, state, params, **rates)`.

    It returns `(params, state)` without ever forming the difference of old and new parameters, so that both may be
    written in place.
    """

    step: Callable[..., tuple[Any, Any]]

    def __new__(cls, init: Callable[..., Any], update: Callable[..., Any], step: Callable[..., tuple[Any, Any]]):
        """All three are pure functions."""
        self = super().__new__(cls, init, update)  # for optax a pair, as every transformation
        self.step = step
        return self


def take_step(
    optimizer: optax.GradientTransformation, gradients: Any, state: Any, params: Any, **rates: Any
) -> tuple[Any, Any]:
    """`(params, state)` after a step of any optax transformation, by its own `step` if it has one."""
    if isinstance(optimizer, FusedOptimizer):
        return optimizer.step(gradients, state, params, **rates)
    updates, state = _update(optimizer, gradients, state, params, **rates)
    return optax.apply_updates(params, updates), state


def _update(optimizer, gradients, state, params, **rates):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float and int32 in Adam's bias correction
        return optax.with_extra_args_support(optimizer).update(gradients, state, params, **rates)


def make_optimizer(
    name: Literal["adamw", "adamw_8bit", "sgd"],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    is_critic: Callable[[Any], Any] | None = None,
    stochastic_rounding: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping, then AdamW or SGD; `update(..., learning_rate=...)` takes the rate, which may be traced.

    Args:
      name: "adamw", "sgd", or "adamw_8bit", whose state takes about a quarter of the memory of AdamW's and which is a
        `FusedOptimizer`.
      betas, eps: of Adam.
      weight_decay: decoupled, times the learning rate.
      max_grad_norm: of all gradients together; None: no clipping.
      is_critic: parameters -> a tree of bools; where True, `critic_learning_rate` is followed instead.
      stochastic_rounding: of bfloat16 parameters, by "adamw_8bit" alone; None: its default, which is to do so.

    Raises:
      InputError: `stochastic_rounding` for an optimiser that has none.
    """
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    if name == "adamw_8bit":
        return _adamw_8bit(clip, betas, eps, weight_decay, is_critic, stochastic_rounding is not False)
    if stochastic_rounding is not None:
        raise InputError(f"stochastic_rounding={stochastic_rounding}: {name} rounds to nearest; adamw_8bit can do both")
    direction = {"adamw": optax.scale_by_adam(*betas, eps=eps), "sgd": optax.identity()}
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(clip, direction[name], *decay, _descend(is_critic))


def separate_optimizers(
    policy: optax.GradientTransformation, critic: optax.GradientTransformation, is_critic: Callable[[Any], Any]
) -> FusedOptimizer:
    """One optimiser for the policy's parameters and one for the critic's; each clips the norm of its own gradients.

    `update(..., learning_rate=..., critic_learning_rate=...)`: each follows its own. The state is a pair of theirs.

    Args:
      policy, critic: of `make_optimizer`.
      is_critic: parameters -> a tree of bools, made by mapping over what it is given.
    """
    optimizers = policy, critic

    def half(tree: Any, wanted: bool) -> Any:
        """The leaves of the critic, or of the policy; nothing stands in the place of the others."""
        return jax.tree.map(lambda x, of: x if of == wanted else optax.MaskedNode(), tree, is_critic(tree))

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(optimizer.init(half(params, i == 1)) for i, optimizer in enumerate(optimizers))

    def each(act: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
        def both(gradients, states, params=None, *, learning_rate, critic_learning_rate, **_):
            done = []
            for i, rate in enumerate((learning_rate, critic_learning_rate)):
                of_gradients, of_params = (None if tree is None else half(tree, i == 1) for tree in (gradients, params))
                rates = {"learning_rate": rate, "critic_learning_rate": rate}
                done.append(act(optimizers[i], of_gradients, states[i], of_params, **rates))
            results, new_states = zip(*done, strict=True)
            return jax.tree.map(lambda of, *pair: pair[of], is_critic(gradients), *results), new_states

        return both

    return FusedOptimizer(init, each(_update), each(take_step))


class AdamW8bitState(NamedTuple):
    """State of `adamw_8bit`."""

    step: Int[Array, ""]  # steps taken
    moments: Any  # of `Moments`, one a parameter


def _adamw_8bit(
    clip: optax.GradientTransformation,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    is_critic: Callable[[Any], Any] | None,
    stochastic_rounding: bool,
) -> FusedOptimizer:
    """Its updates are exact differences: adding them gives the parameters of its step.

    Random bits, with which bfloat16 parameters are rounded, depend on step and place alone.
    """

    def init(params: Any) -> AdamW8bitState:
        return AdamW8bitState(jnp.zeros((), jnp.int32), jax.tree.map(init_moments, params))

    def step(updates, state, params, *, learning_rate, critic_learning_rate=None, **_):
        gradients, _ = clip.update(updates, optax.EmptyState())
        rates = _rates(params, is_critic, learning_rate, critic_learning_rate)
        places = itertools.count()

        def one(param, gradient, moments, rate):
            return adamw_8bit(
                param,
                gradient,
                moments,
                step=state.step + 1,
                learning_rate=rate,
                b1=betas[0],
                b2=betas[1],
                eps=eps,
                weight_decay=weight_decay,
                key=jax.random.key(next(places)) if stochastic_rounding else None,
            )

        stepped = jax.tree.map(one, params, gradients, state.moments, rates)
        new, moments = (jax.tree.map(lambda _, pair, i=i: pair[i], params, stepped) for i in (0, 1))
        return new, AdamW8bitState(state.step + 1, moments)

    def update(updates, state, params=None, **rates):
        new, state = step(updates, state, params, **rates)
        return jax.tree.map(jnp.subtract, new, params), state

    return FusedOptimizer(init, update, step)


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

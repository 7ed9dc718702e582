"""What layers keep of their forward pass for the backward pass; everything else is computed again from their inputs.

Activations have names (`jax.ad_checkpoint.checkpoint_name`) where they arise, in `layers.py` and in the operations of
`pallas_kernels`. A plan says, for groups of consecutive layers, which of them are kept, and which in the host's memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_policies

from rapidfire_jax.errors import InputError

NAMES = {
    "attention_norm": "normalised input of the attention",
    "query": "queries as the attention takes them; before their norm where they have one",
    "key": "keys, likewise",
    "value": "values",
    "attention_out": "result of the attention, before its output projection",
    "attention_lse": "logarithm of the softmax's denominator",
    "attention_update": "what the attention adds to the residual stream, before its norm (models with such norms)",
    "residual": "residual stream between attention and MLP",
    "mlp_norm": "normalised input of the MLP",
    "rstd": "reciprocal root mean squares of all norms, with the norm kernel",
    "gate": "input of the activation, in a gated MLP",
    "up": "input of the activation, or what multiplies it in a gated MLP",
    "mlp_hidden": "input of the down projection",
    "mlp_update": "what the MLP adds to the residual stream, before its norm (models with such norms)",
    "lora": "`x A` of every adapter",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """What some consecutive layers keep: activations by name, or "dots", the results of all products with weights."""

    layers: int | None = None  # how many; None: all that are left
    keep: tuple[str, ...] | Literal["dots"] = ()
    offload: tuple[str, ...] = ()  # names kept in the host's memory

    def __post_init__(self) -> None:
        named = (*(() if isinstance(self.keep, str) else self.keep), *self.offload)
        if unknown := [name for name in named if name not in NAMES]:
            raise InputError(f"remat: no activation is called {unknown[0]!r}; accepted: {', '.join(NAMES)}")


@dataclasses.dataclass(frozen=True)
class Remat:
    """A plan for a stack, from its lowest layer up. Static under jit. A forward pass with None keeps everything."""

    groups: tuple[Group, ...]

    def spans(self, size: int) -> list[tuple[int, int, Group]]:
        """First layer, layer after the last, and group, for a stack of `size` layers; groups may be cut short."""
        found, start = [], 0
        for group in self.groups:
            stop = size if group.layers is None else min(start + group.layers, size)
            if stop > start:
                found.append((start, stop, group))
            start = stop
        if start < size:
            raise InputError(f"remat: the plan is for {start} layers, the stack has {size}")
        return found

    def part(self, start: int, stop: int) -> "Remat":
        """The plan for some of the layers."""
        spans = self.spans(stop)
        return Remat(tuple(dataclasses.replace(g, layers=b - max(a, start)) for a, b, g in spans if b > start))


def keep_names(*names: str) -> Remat:
    """The plan that keeps these activations of every layer."""
    return Remat((Group(keep=names),))


FULL = Remat((Group(),))
DOTS = Remat((Group(keep="dots"),))
CHEAP = ("attention_norm", "mlp_norm", "mlp_hidden")  # to compute again, for what they take
PRODUCTS = keep_names(*(name for name in NAMES if name not in CHEAP))


def checkpointed(step: Callable[..., Any], group: Group | None, layers: int) -> Callable[..., Any]:
    """`step` of a scan over so many layers, keeping what `group` says; None: everything."""
    if group is None:
        return step
    # Forward and backward pass are two loops, so that XLA cannot find in one what the other computes again: unless each
    # goes round once, and XLA takes it for no loop at all.
    return jax.checkpoint(step, policy=_policy(group.keep, group.offload), prevent_cse=layers == 1)


@functools.cache
def _policy(keep: tuple[str, ...] | str, offload: tuple[str, ...]) -> Callable[..., Any] | None:
    if keep == "dots":
        return checkpoint_policies.dots_with_no_batch_dims_saveable
    if not offload:
        return checkpoint_policies.save_only_these_names(*keep)
    return checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(keep),
        names_which_can_be_offloaded=list(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )

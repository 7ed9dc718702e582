"""Gradient checkpointing by the cost of recomputation: the plan that loses least time within a budget of bytes."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rapidfire_jax.memory.layer_costs import LayerCosts, set_sums
from rapidfire_jax.models.remat import Group, Remat


@dataclasses.dataclass(frozen=True)
class Choice:
    """A plan for a stack, and what it costs in one pass through all layers."""

    remat: Remat | None
    nbytes: int  # beyond those of a plan that keeps no name
    host_nbytes: int  # kept in the host's memory
    flops: float  # of what is run again
    seconds: float  # for what is run again, and for writing and reading what is kept


def choose(stacks: Sequence[LayerCosts], budget: float, *, mixes: bool = True) -> list[Choice]:
    """The plans, one a stack, that lose the fewest seconds together while they keep at most `budget` bytes together.

    Exact: over all sets of names, each in the device's or in the host's memory, for all layers of a stack alike; with
    `mixes` also over all pairs of those, any number of layers having the one and the rest the other; and over keeping
    everything. Transfers to the host and back are counted as if nothing else went on meanwhile.

    Args:
      stacks: one, or two that learn together.
      budget: bytes for what is kept at the end of the forward pass, at least 0.
      mixes: False where cutting a stack would copy its weights, since they are trained.
    """
    tables = [_plans(costs, _sets(costs), mixes) for costs in stacks]
    if len(tables) == 1:
        picked = [int(np.searchsorted(tables[0].nbytes, budget, "right")) - 1]
    else:
        first, second = tables
        partner = np.searchsorted(second.nbytes, budget - first.nbytes, "right") - 1
        seconds = np.where(partner < 0, np.inf, first.seconds + second.seconds[partner])
        best = int(np.argmin(seconds))
        picked = [best, int(partner[best])]
    return [_choice(costs, table.sets, table.mixes[i]) for costs, table, i in zip(stacks, tables, picked, strict=True)]


class _Sets(NamedTuple):
    """Sets of names for one layer, none of which costs more than another in both bytes and seconds."""

    nbytes: np.ndarray
    seconds: np.ndarray
    kept: np.ndarray  # numbers of sets, those in the host's memory included
    offloaded: np.ndarray


class _Plans(NamedTuple):
    """Plans for a stack, none of which costs more than another in both: fewest bytes first, and so most seconds."""

    nbytes: np.ndarray
    seconds: np.ndarray
    mixes: np.ndarray  # [plans, 3]: number of layers with the first set, that set, the other; no set: everything
    sets: _Sets


def _frontier(nbytes: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Indices of those that nothing else beats, by bytes."""
    order = np.lexsort((seconds, nbytes))
    best = np.minimum.accumulate(seconds[order])
    return order[np.concatenate([[True], seconds[order][1:] < best[:-1]])]


def _sets(costs: LayerCosts) -> _Sets:
    sets, sizes, device = np.arange(len(costs.seconds)), set_sums(costs.nbytes), costs.device
    found = [(sizes, costs.seconds, sets, np.zeros_like(sets))]
    if device.host_bandwidth is not None:
        worth = costs.seconds[0] - costs.seconds.min()  # more than that nothing saves
        transfer = 2 * sizes / device.host_bandwidth
        for away in sets[(transfer < worth) & (sets > 0)]:
            of = sets[sets & away == away]
            found.append((sizes[of] - sizes[away], costs.seconds[of] + transfer[away], of, np.full_like(of, away)))
    nbytes, seconds, kept, offloaded = map(np.concatenate, zip(*found, strict=True))
    best = _frontier(nbytes, seconds)
    return _Sets(nbytes[best], seconds[best], kept[best], offloaded[best])


def _plans(costs: LayerCosts, sets: _Sets, mixes: bool) -> _Plans:
    layers, count = costs.layers, len(sets.nbytes)
    same = np.arange(count)
    everything = layers * np.array([costs.everything, 2 * costs.everything / costs.device.bandwidth])
    found = [
        (layers * sets.nbytes, layers * sets.seconds, np.stack([np.full(count, layers), same, same], axis=1)),
        (everything[:1], everything[1:], np.array([[layers, count, count]])),
    ]
    few, many = np.triu_indices(count, 1)  # sets by bytes
    for n in range(1, layers) if mixes else ():
        nbytes = n * sets.nbytes[many] + (layers - n) * sets.nbytes[few] + costs.trained
        seconds = n * sets.seconds[many] + (layers - n) * sets.seconds[few]
        best = _frontier(nbytes, seconds)
        chosen = np.stack([np.full(len(best), n), many[best], few[best]], axis=1)
        found.append((nbytes[best], seconds[best], chosen))
    nbytes, seconds, chosen = map(np.concatenate, zip(*found, strict=True))
    best = _frontier(nbytes, seconds)
    return _Plans(nbytes[best], seconds[best], chosen[best], sets)


def _choice(costs: LayerCosts, sets: _Sets, mix: np.ndarray) -> Choice:
    n, *pair = map(int, mix)
    if pair[0] == len(sets.nbytes):
        nbytes = costs.layers * costs.everything
        return Choice(None, nbytes, 0, 0.0, 2 * nbytes / costs.device.bandwidth)
    parts = [(count, i) for count, i in zip((n, costs.layers - n), pair, strict=True) if count]
    total = lambda values: sum(count * values[i] for count, i in parts)  # noqa: E731
    groups = [Group(count, *_names(costs, int(sets.kept[i]), int(sets.offloaded[i]))) for count, i in parts]
    return Choice(
        Remat((*groups[:-1], dataclasses.replace(groups[-1], layers=None))),
        int(total(sets.nbytes)) + costs.trained * (len(parts) - 1),
        int(total(set_sums(costs.nbytes)[sets.offloaded])),
        float(total(costs.flops[sets.kept])),
        float(total(sets.seconds)),
    )


def _names(costs: LayerCosts, kept: int, offloaded: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a set: those in the device's memory, those in the host's."""
    of = lambda number: tuple(name for i, name in enumerate(costs.names) if number >> i & 1)  # noqa: E731
    return of(kept & ~offloaded), of(offloaded)

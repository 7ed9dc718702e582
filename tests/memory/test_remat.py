"""Against brute force: every plan there is, one by one."""

import dataclasses
import itertools

import numpy as np
import pytest

from rapidfire_jax.memory.layer_costs import LayerCosts
from rapidfire_jax.memory.remat import choose
from rapidfire_jax.models.remat import FULL
from tests.memory.conftest import SLOW

NAMES = ("query", "residual", "gate", "up")


def random_costs(seed, layers=3, names=3, device=SLOW) -> LayerCosts:
    """Work that falls with what is kept, but not by a fixed amount a name; sizes with ties among them."""
    random = np.random.default_rng(seed)
    sets = np.arange(2**names)
    work = np.zeros(2**names)
    for group in range(1, 2**names):  # is done unless something of the group is kept
        work += np.where(sets & group == 0, random.integers(0, 50) * 1e6, 0.0)
    nbytes = random.integers(1, 5, names) * 1000
    seconds = work / SLOW.float32_rate + 2 * sum((sets >> i & 1) * nbytes[i] for i in range(names)) / SLOW.bandwidth
    return LayerCosts(layers, NAMES[:names], nbytes, work, seconds, int(nbytes.sum() + 3000), 700, device)


def every_set(costs):
    """(bytes, seconds) of all ways to keep, offload or drop each name."""
    away = (0,) if costs.device.host_bandwidth is None else (0, 1)
    for number in range(len(costs.seconds)):
        kept = [i for i in range(len(costs.names)) if number >> i & 1]
        for moved in itertools.product(away, repeat=len(kept)):
            host = sum(int(costs.nbytes[i]) for i, m in zip(kept, moved, strict=True) if m)
            here = sum(int(costs.nbytes[i]) for i in kept) - host
            yield here, costs.seconds[number] + (2 * host / costs.device.host_bandwidth if host else 0.0)


def every_plan(costs, mixes=True):
    sets = list(every_set(costs))
    yield costs.layers * costs.everything, costs.layers * 2 * costs.everything / costs.device.bandwidth
    for (b, s), (c, t) in itertools.product(sets, sets):
        for n in range(costs.layers + 1) if mixes else (costs.layers,):
            cut = costs.trained if 0 < n < costs.layers else 0
            yield n * b + (costs.layers - n) * c + cut, n * s + (costs.layers - n) * t


def cost_of(costs, choice):
    """(bytes, seconds) of a choice, from its plan alone."""
    if choice.remat is None:
        return costs.layers * costs.everything, costs.layers * 2 * costs.everything / costs.device.bandwidth
    nbytes, seconds = costs.trained * (len(choice.remat.groups) - 1), 0.0
    for start, stop, group in choice.remat.spans(costs.layers):
        here, away = (sum(costs.nbytes[costs.names.index(n)] for n in names) for names in (group.keep, group.offload))
        set_of = costs.subset(*group.keep, *group.offload)
        nbytes += (stop - start) * int(here)
        seconds += (stop - start) * (costs.seconds[set_of] + (2 * away / costs.device.host_bandwidth if away else 0))
    return nbytes, seconds


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("host_bandwidth", [None, 4e8, 1e12])
@pytest.mark.parametrize("seed", range(4))
def test_no_plan_loses_less_time_within_the_budget(seed, host_bandwidth, mixes):
    costs = random_costs(seed, device=dataclasses.replace(SLOW, host_bandwidth=host_bandwidth))
    plans = list(every_plan(costs, mixes))
    for budget in (0, 999, 5_500, 12_345, 25_000, 10**6):
        (choice,) = choose([costs], budget, mixes=mixes)
        nbytes, seconds = cost_of(costs, choice)
        assert (choice.nbytes, choice.seconds) == (nbytes, pytest.approx(seconds))
        assert nbytes <= budget
        assert seconds == pytest.approx(min(s for b, s in plans if b <= budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_two_stacks_share_a_budget(seed):
    device = dataclasses.replace(SLOW, host_bandwidth=None)
    stacks = [random_costs(seed, 2, 2, device), random_costs(seed + 10, 3, 2, device)]
    plans = [list(every_plan(costs)) for costs in stacks]
    for budget in (0, 4_000, 11_000, 20_000, 10**6):
        choices = choose(stacks, budget)
        found = [cost_of(*pair) for pair in zip(stacks, choices, strict=True)]
        assert sum(b for b, _ in found) <= budget
        best = min(s + t for (b, s), (c, t) in itertools.product(*plans) if b + c <= budget)
        assert sum(s for _, s in found) == pytest.approx(best, rel=1e-12)


def test_without_a_byte_nothing_is_kept_and_a_fast_link_takes_everything_to_the_host():
    costs = random_costs(0, device=dataclasses.replace(SLOW, host_bandwidth=None))
    assert choose([costs], 0)[0].remat == FULL
    costs = random_costs(0, device=dataclasses.replace(SLOW, host_bandwidth=1e15))
    (choice,) = choose([costs], 0)
    assert choice.nbytes == 0 < choice.host_nbytes and choice.remat.groups[0].offload


def test_what_is_chosen_counts_its_flops():
    costs = random_costs(1, device=dataclasses.replace(SLOW, host_bandwidth=None))
    assert choose([costs], 0)[0].flops == costs.layers * costs.flops[0]
    (choice,) = choose([costs], 11_000)
    expected = sum((b - a) * costs.flops[costs.subset(*g.keep)] for a, b, g in choice.remat.spans(costs.layers))
    assert choice.flops == expected < costs.layers * costs.flops[0]

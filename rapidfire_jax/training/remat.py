"""From the section `memory` to a plan of what is kept: presets, names, or what the compiler says there is room for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from rapidfire_jax.config import MemoryConfig
from rapidfire_jax.errors import InputError
from rapidfire_jax.memory.devices import GIB, Device, present_device
from rapidfire_jax.memory.layer_costs import LayerCosts, layer_costs
from rapidfire_jax.memory.remat import Choice, choose
from rapidfire_jax.models.policy import Parts, Policy
from rapidfire_jax.models.remat import DOTS, FULL, PRODUCTS, Remat, keep_names
from rapidfire_jax.models.scorer import Scorer
from rapidfire_jax.programs import Need, need_of


def preset(memory: MemoryConfig) -> Remat | None:
    """The plan that the configuration names; of `auto`, that from which `fit_plan` starts."""
    plans = {"auto": FULL, "none": None, "products": PRODUCTS, "dots": DOTS, "full": FULL}
    return plans[memory.remat] if isinstance(memory.remat, str) else keep_names(*memory.remat)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Plans that were chosen, of policy and critic or of the one model there is; all bytes are those of temporaries."""

    budget: int
    full: int  # by the compiler, if everything is computed again
    measured: int  # by the compiler, with these plans
    costs: list[LayerCosts]
    choices: list[Choice]

    @property
    def predicted(self) -> int:
        """What `measured` should be."""
        return self.full + sum(choice.nbytes for choice in self.choices)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "budget_bytes": self.budget,
            "full_remat_bytes": self.full,
            "predicted_bytes": self.predicted,
            "measured_bytes": self.measured,
            "stacks": [
                {"layers": costs.layers, "groups": _groups(costs, choice), "seconds_a_pass": choice.seconds}
                for costs, choice in zip(self.costs, self.choices, strict=True)
            ],
        }

    def show(self) -> None:
        """Prints a table of the activations, and which of them are kept of how many layers."""
        for costs, choice in zip(self.costs, self.choices, strict=True):
            title = f"Kept for the backward pass, of {costs.layers} layers"
            table = Table("activation", "MiB a layer", "GFLOP", "us to compute it again", "layers", title=title)
            for row in activations(costs, choice):
                numbers = (f"{row['mib']:.2f}", f"{row['gflop']:.2f}", f"{row['us']:.1f}", row["layers"])
                table.add_row(row["name"], *numbers)
            Console().print(table)
        print(
            f"temporaries of learning: {self.measured / GIB:.3f} GiB (predicted {self.predicted / GIB:.3f}, budget "
            f"{self.budget / GIB:.3f}, at least {self.full / GIB:.3f})",
            flush=True,
        )


def activations(costs: LayerCosts, choice: Choice) -> list[dict[str, Any]]:
    """What keeping each activation takes, and computing it again from all others; of how many layers it is kept."""
    every = len(costs.seconds) - 1
    spans = [] if choice.remat is None else choice.remat.spans(costs.layers)
    rows = []
    for i, name in enumerate(costs.names):
        without, move = every ^ (1 << i), 2 * costs.nbytes[i] / costs.device.bandwidth
        kept = sum(stop - start for start, stop, group in spans if name in group.keep)
        away = sum(stop - start for start, stop, group in spans if name in group.offload)
        rows.append(
            {
                "name": name,
                "mib": costs.nbytes[i] / 2**20,
                "gflop": (costs.flops[without] - costs.flops[every]) / 1e9,
                "us": (costs.seconds[without] - costs.seconds[every] + move) * 1e6,
                "layers": "all" if choice.remat is None else f"{kept}" + (f", {away} in the host" if away else ""),
            }
        )
    return rows


def _groups(costs: LayerCosts, choice: Choice) -> list[dict[str, Any]]:
    if choice.remat is None:
        return [{"layers": costs.layers, "keep": "all", "offload": []}]
    return [
        {"layers": stop - start, "keep": list(group.keep), "offload": list(group.offload)}
        for start, stop, group in choice.remat.spans(costs.layers)
    ]


def fit_plan[M: Policy | Scorer](
    model: M,
    program: Callable[[M], Any],
    args: tuple[Any, ...],
    memory: MemoryConfig,
    device: Device | None = None,
    need: Callable[[Any, tuple[Any, ...]], Need] | None = None,
) -> tuple[M, Fitted]:
    """The model with the plan that loses least time within the budget for temporaries of its learning program.

    Compiles that program with everything computed again, adds what a plan keeps to its temporaries, and compiles the
    plan that is chosen; should the compiler want more than was predicted, another is chosen with so much less.

    Args:
      model: static half of what is trained.
      program: from a model to its learning program, jitted.
      args: of that program, arrays or shapes; the largest that will occur.
      memory: budget.
      device: where it runs; by default the present one.
      need: of a program for its arguments; by default the present device's compiler is asked.

    Raises:
      InputError: no budget was given and the device does not tell, or not even everything computed again fits.
    """
    device = present_device() if device is None else device
    need = need or (lambda program, args: need_of(program.lower(*args).compile()))
    full = _with(model, [FULL] * len(_plans(model)))
    of_full = need(program(full), args)
    if memory.budget_gb is not None:
        budget, what = int(memory.budget_gb * GIB), f"memory.budget_gb={memory.budget_gb:g}"
    elif device.name == "cpu":
        raise InputError("memory.remat=auto: a CPU does not say what may be used; give memory.budget_gb, in GiB")
    else:
        budget = device.memory - (of_full.peak - of_full.temporaries)
        what = f"the {device.memory / GIB:.2f} GiB of the device"
    needed = of_full.temporaries
    if needed > budget:
        raise InputError(
            f"{what}: {budget / GIB:.3f} GiB are left for temporaries of learning, which takes {needed / GIB:.3f} GiB "
            "even if all layers are computed again; use more micro_batches, shorter sequences or a larger budget"
        )
    costs = [layer_costs(program(one).trace(*args).jaxpr, device) for one in _one_by_one(model)]
    room = budget - needed
    while True:
        choices = choose(costs, room, mixes=not model.full)
        fitted = _with(model, [choice.remat for choice in choices])
        measured = need(program(fitted), args).temporaries
        kept = sum(choice.nbytes for choice in choices)
        if measured <= budget or kept == 0:
            return fitted, Fitted(budget, needed, measured, costs, choices)
        room = max(kept - (measured - budget), 0)


def _plans(model: Policy | Scorer) -> list[Remat | None]:
    if isinstance(model, Scorer):
        return [model.remat]
    return list(model.remat) if model.graphdefs.critic is not None else [model.remat.policy]


def _with[M: Policy | Scorer](model: M, plans: list[Remat | None]) -> M:
    remat: Any = plans[0] if isinstance(model, Scorer) else Parts(*plans)
    return dataclasses.replace(model, remat=remat)


def _one_by_one[M: Policy | Scorer](model: M) -> list[M]:
    """The model with one of its stacks computed again at a time, and everything kept of the other."""
    count = len(_plans(model))
    return [_with(model, [FULL if i == j else None for j in range(count)]) for i in range(count)]


def shapes(tree: Any) -> Any:
    """Shapes and dtypes of arrays, which a program can be compiled for."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

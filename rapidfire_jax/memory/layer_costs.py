"""What it costs to compute a layer's activations again, read off the program of its backward pass.

The gradient of a function that keeps nothing of its layers (`models.remat.FULL`) goes back through them in a loop: its
body is one layer's forward pass and its derivative. What depends on a cotangent is the derivative; the rest is run
again only because it was not kept. The last layer, of which less may be wanted, stands before the loop and is counted
as another turn of it. So the program says for every set of kept activations which equations are left to run, whatever
the model. Nothing here knows of any.

Seconds are those of a roofline. A product, or a kernel, takes the longer of its FLOPs and of reading its operands and
writing its result. What stands between products is fused: it takes the time to read what is in memory already, products
and kept activations, and to write what products will read. Integers and masks cost nothing. An activation that is kept
takes the time to write it once and to read it once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from rapidfire_jax.memory.devices import Device
from rapidfire_jax.memory.jaxprs import KERNELS, LOOPS, Inlined, Op, inner

OPAQUE = (*KERNELS, *LOOPS)  # counted as a whole
_VIEWS = {"name", "reshape", "squeeze", "expand_dims", "transpose", "copy", "reduce_precision"}  # no work of their own
_CUT = "dynamic_slice"  # of weights of several layers, which whoever uses them reads in place


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """Costs of one layer of a stack. A set of names is a number whose bit i stands for `names[i]`."""

    layers: int  # of the stack
    names: tuple[str, ...]  # of activations that save work if kept, in the order in which they arise
    nbytes: np.ndarray  # int64 [names]: of each
    flops: np.ndarray  # float64 [2 ** len(names)]: of products that are run again, by the set of names that is kept
    seconds: np.ndarray  # float64 [2 ** len(names)]: of what is run again, by the same
    everything: int  # bytes that are kept without any plan, beyond those of a plan that keeps no name
    trained: int  # bytes of what is trained of the whole stack; where it is cut in groups, that is copied
    device: Device

    def subset(self, *names: str) -> int:
        """The number of a set of names; those that save no work are left out."""
        return sum(1 << self.names.index(name) for name in set(names).intersection(self.names))

    def __add__(self, other: "LayerCosts") -> "LayerCosts":
        """Costs of two passes through the same layers."""
        assert (self.layers, self.names) == (other.layers, other.names)
        parts = ("nbytes", "flops", "seconds", "everything", "trained")
        return dataclasses.replace(self, **{name: getattr(self, name) + getattr(other, name) for name in parts})


def layer_costs(gradient: ClosedJaxpr, device: Device) -> LayerCosts:
    """Costs of the layers of a stack.

    Args:
      gradient: the traced gradient of a function that runs this stack, and no other, with `models.remat.FULL`; what
        stands around, an optimiser or loops over minibatches, does not matter.
      device: where it will run; kernels count if it was traced for a device that has them.

    Raises:
      ValueError: no layers are computed again in this program.
    """
    found = list(_backward_passes(gradient.jaxpr))
    if not found:
        raise ValueError("no layers are computed again in this program")
    loops = [eqn for eqn in found if eqn.primitive.name == "scan"]
    costs = functools.reduce(LayerCosts.__add__, (_costs(eqn, device) for eqn in loops or found))
    alone = len(found) // len(loops) - 1 if loops else 0
    return dataclasses.replace(costs, layers=costs.layers + alone)


def _backward_passes(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Loops over layers, and layers that stand alone."""
    for eqn in jaxpr.eqns:
        parts = inner(eqn)
        loop = eqn.params.get("reverse") and any(again.params.get("differentiated") for again in parts[0].eqns)
        if loop or eqn.params.get("differentiated"):
            yield eqn
        else:
            for part in parts:
                yield from _backward_passes(part)


# FLOPs of an equation


def _halved_attention(ins: list[Any], outs: list[Any]) -> float:
    (B, S, N, H), C = ins[0].shape, ins[1].shape[1]
    return 2 * B * S * C * N * H  # two products, half of whose pairs are never computed: no query sees a later key


def _matmul(ins: list[Any], outs: list[Any]) -> float:
    return 2 * ins[0].shape[-1] * outs[0].size


KERNEL_FLOPS: dict[str, Callable[[list[Any], list[Any]], float]] = {
    "flash_attention_forward": _halved_attention,
    "quantized_matmul_forward": _matmul,
}


def count_flops(eqn: JaxprEqn) -> float:
    """FLOPs of the matrix products of an equation, those inside of it included; of kernels, by `KERNEL_FLOPS`."""
    name = eqn.params.get("name")
    if eqn.primitive.name in OPAQUE and name in KERNEL_FLOPS:
        return KERNEL_FLOPS[name](list(map(_aval, eqn.invars)), list(map(_aval, eqn.outvars)))
    if eqn.primitive.name == "dot_general":
        contracted, _ = eqn.params["dimension_numbers"]
        left, result = _aval(eqn.invars[0]), _aval(eqn.outvars[0])
        return 2.0 * result.size * math.prod(left.shape[i] for i in contracted[0])
    inside = [sum(map(count_flops, jaxpr.eqns)) for jaxpr in inner(eqn)]
    if eqn.primitive.name == "scan":
        return eqn.params["length"] * inside[0]
    return max(inside) if eqn.primitive.name == "cond" else sum(inside)


def _aval(var: Any) -> Any:
    """Shape and dtype."""
    return var.aval


# One layer as operations on numbered values


class _Body(Inlined):
    """What the body of a loop computes, or a layer that stands alone: its cotangent is its last operand."""

    def __init__(self, loop: JaxprEqn):
        (jaxpr,) = inner(loop)
        super().__init__(jaxpr)
        if loop.primitive.name != "scan":
            *self.sliced, cotangent = self.inputs
            self.carried = [cotangent]
            return
        cut = [_differ(*pair) for pair in zip(loop.invars, jaxpr.invars, strict=True)]
        carried = len(jaxpr.outvars) - sum(map(_differ, loop.outvars, jaxpr.outvars))
        first = len(cut) - sum(cut)  # that is cut into slices; before it stand what is carried, and constants
        self.carried, self.sliced = self.inputs[first - carried : first], self.inputs[first:]

    def nbytes(self, value: int) -> int:
        """Bytes; of integers and masks 0."""
        dtype = self.avals[value].dtype
        return self.avals[value].size * dtype.itemsize if jnp.issubdtype(dtype, jnp.inexact) else 0

    def depending(self, values: Iterable[int]) -> set[int]:
        """These values and all that are computed from them."""
        found = set(values)
        for op in self.ops:
            if found.intersection(op.inputs):
                found.update(op.outputs)
        return found


def _differ(outer: Any, inner: Any) -> bool:
    return outer.aval.shape != inner.aval.shape


def _is_product(op: Op) -> bool:
    return op.name in OPAQUE or op.name == "dot_general"


def _costs(loop: JaxprEqn, device: Device) -> LayerCosts:
    body = _Body(loop)
    of_cotangents = body.depending(body.carried)
    derivative = [op for op in body.ops if of_cotangents.intersection(op.inputs)]
    forward = [op for op in body.ops if not of_cotangents.intersection(op.inputs)]
    wanted = {i for op in derivative for i in op.inputs} - of_cotangents

    labels = {op.outputs[0]: op.eqn.params["name"] for op in forward if op.name == "name"}
    names = tuple(dict.fromkeys(labels.values()))
    flops, seconds = _work(body, forward, derivative, wanted, labels, names, device)
    useful = [i for i in range(len(names)) if _saves(seconds, i)]
    names = tuple(names[i] for i in useful)
    flops, seconds = (_of_sets(costs, useful) for costs in (flops, seconds))
    nbytes = np.array([sum(body.nbytes(v) for v in labels if labels[v] == name) for name in names], np.int64)
    seconds = seconds + 2 * set_sums(nbytes) / device.bandwidth

    differing = body.depending(body.sliced)
    residuals = {i for op in forward for i in op.outputs} & wanted & differing
    stream = body.avals[body.carried[0]]  # of the layer's input, which an empty plan keeps
    unused = [i for i in body.sliced if i not in wanted and _alike(body.avals[i], stream)]
    everything = sum(map(body.nbytes, residuals)) - sum(map(body.nbytes, unused[:1]))
    pairs = zip(loop.outvars, inner(loop)[0].outvars, strict=True)
    gradients = [_aval(outer) for outer, inner in pairs if _differ(outer, inner)]
    trained = sum(aval.size * aval.dtype.itemsize for aval in gradients)
    layers = loop.params.get("length", 1)
    return LayerCosts(layers, names, nbytes, flops, seconds, everything, trained, device)


def _alike(a: Any, b: Any) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype)


def _work(
    body: _Body,
    forward: list[Op],
    derivative: list[Op],
    wanted: set[int],
    labels: dict[int, str],
    names: tuple[str, ...],
    device: Device,
) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs and seconds of what is run again, by the set of names that is kept."""
    sets = np.arange(2 ** len(names))
    never, always = np.zeros(len(sets), bool), np.ones(len(sets), bool)
    kept = {value: (sets >> names.index(name) & 1).astype(bool) for value, name in labels.items()}
    needed = dict.fromkeys(wanted, always)  # for each value, in which sets somebody wants it
    runs: dict[int, np.ndarray] = {}  # by the number of an output
    for op in reversed(forward):
        run = functools.reduce(np.logical_or, (needed.get(i, never) for i in op.outputs))
        if op.outputs[0] in kept:
            run = run & ~kept[op.outputs[0]]
        runs.update(dict.fromkeys(op.outputs, run))
        needed.update((i, needed.get(i, never) | run) for i in op.inputs)

    root = list(range(len(body.avals)))  # the value that a view shows
    fused: set[int] = set()
    for op in forward:
        if op.name in _VIEWS:
            root[op.outputs[0]] = root[op.inputs[0]]
        elif op.name != _CUT and not _is_product(op):
            fused.update(op.outputs)

    flops, seconds = np.zeros(len(sets)), np.zeros(len(sets))
    read: dict[int, np.ndarray] = {}
    written: dict[int, np.ndarray] = {}
    for op in forward:
        run = runs[op.outputs[0]]
        if _is_product(op):
            work = count_flops(op.eqn)
            moved = sum(map(body.nbytes, (*op.inputs, *op.outputs)))
            flops += np.where(run, work, 0.0)
            seconds += np.where(run, device.seconds(work, moved, body.avals[op.inputs[0]].dtype), 0.0)
            written.update((i, written.get(i, never) | run) for i in {root[i] for i in op.inputs} & fused)
        elif op.name not in (*_VIEWS, _CUT) and any(map(body.nbytes, op.outputs)):
            for i in {root[i] for i in op.inputs}:
                read[i] = read.get(i, never) | (run & ~runs[i] if i in fused else run)
    for op in derivative:
        if _is_product(op):
            written.update(dict.fromkeys({root[i] for i in op.inputs if i in wanted} & fused, always))
    for i, when in read.items():
        seconds += np.where(when, body.nbytes(i) / device.bandwidth, 0.0)
    for i, when in written.items():
        seconds += np.where(when & runs[i], body.nbytes(i) / device.bandwidth, 0.0)
    return flops, seconds


def set_sums(sizes: np.ndarray) -> np.ndarray:
    """The sum of sizes of each set of them."""
    sets = np.arange(2 ** len(sizes))
    return sum(((sets >> i & 1) * size for i, size in enumerate(sizes)), np.zeros(len(sets), np.int64))


def _saves(costs: np.ndarray, i: int) -> bool:
    """Whether element i of a set makes a difference, whatever else is in it."""
    pairs = costs.reshape(-1, 2, 2**i)
    return not np.array_equal(pairs[:, 0], pairs[:, 1])


def _of_sets(costs: np.ndarray, elements: list[int]) -> np.ndarray:
    """Costs of the sets of these elements alone, numbered anew."""
    return costs[set_sums(np.array([1 << i for i in elements], np.int64))]

"""Memory of a program by its trace alone, where no compiler for the device is at hand.

Arrays are held from where they are computed to their last use, in the order in which the program was written. What a
product, a kernel, a loop, a gather or a reduction computes is an array; everything between these is fused into what
reads it. A compiler orders better and shares buffers, but also makes copies that are not seen here.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from rapidfire_jax.programs import Need

KERNELS = ("pallas_call", "mpmd_map", "core_map")
LOOPS = ("scan", "while", "cond")
# What else makes an array in memory, by the beginning of its name.
ARRAYS = (
    *KERNELS, *LOOPS, "dot_general", "gather", "scatter", "concatenate", "pad", "dynamic_", "sort", "top_k", "cum",
    "reduce_", "arg", "random_", "threefry", "ragged_", "all_", "psum",
)  # fmt: skip
FUSED = ("reduce_precision",)


def estimate(program: ClosedJaxpr, donated: int) -> Need:
    """What a traced program takes.

    Args:
      program: traced for the device, so that its kernels are in it.
      donated: bytes of arguments whose memory outputs take over.
    """
    jaxpr = program.jaxpr
    arguments, outputs = (sum(map(_nbytes, variables)) for variables in (jaxpr.invars, jaxpr.outvars))
    return Need(arguments, _temporaries(jaxpr), outputs, min(donated, outputs))


class _Op(NamedTuple):
    eqn: JaxprEqn
    inputs: list[int]
    outputs: list[int]

    @property
    def is_array(self) -> bool:
        name = self.eqn.primitive.name
        return name.startswith(ARRAYS) and name not in FUSED


class _Flat:
    """A program with its calls inlined; values are numbers."""

    def __init__(self, jaxpr: Jaxpr):
        self.sizes: list[int] = []
        self.ops: list[_Op] = []
        self.outputs = self._inline(jaxpr, {var: self._new(var) for var in (*jaxpr.invars, *jaxpr.constvars)})

    def _new(self, var: Any) -> int:
        self.sizes.append(_nbytes(var))
        return len(self.sizes) - 1

    def _inline(self, jaxpr: Jaxpr, known: dict[Any, int]) -> list[int]:
        def read(variables: Iterable[Any]) -> list[int]:
            return [self._new(v) if isinstance(v, Literal) else known[v] for v in variables]

        for eqn in jaxpr.eqns:
            inner = _inner(eqn)
            inputs = read(eqn.invars)
            if len(inner) == 1 and len(inner[0].invars) == len(inputs) and eqn.primitive.name not in (*LOOPS, *KERNELS):
                bound = dict(zip(inner[0].invars, inputs, strict=True))
                outputs = self._inline(inner[0], bound | {var: self._new(var) for var in inner[0].constvars})
            else:
                outputs = [self._new(var) for var in eqn.outvars]
                self.ops.append(_Op(eqn, inputs, outputs))
            known.update(zip(eqn.outvars, outputs, strict=True))
        return read(jaxpr.outvars)


def _temporaries(jaxpr: Jaxpr) -> int:
    """Most bytes of computed arrays that are held at a time, beyond those of the results."""
    flat = _Flat(jaxpr)
    sources: dict[int, set[int]] = {}  # of a value that is not an array: the arrays that are read in its place
    last: dict[int, int] = {}  # of an array: when it is read last
    for i, op in enumerate(flat.ops):
        read = set().union(*(sources.get(v, set()) for v in op.inputs))
        if op.is_array:
            last.update(dict.fromkeys((*read, *op.outputs), i))
            sources.update((v, {v}) for v in op.outputs)
        else:
            sources.update((v, read) for v in op.outputs)
    results = set(flat.outputs) & sources.keys()
    last.update(dict.fromkeys(set().union(*(sources[v] for v in results)), len(flat.ops)))

    ending: dict[int, int] = {}  # bytes that are given back after an operation
    for v, i in last.items():
        ending[i] = ending.get(i, 0) + flat.sizes[v]
    held = most = 0
    for i, op in enumerate(flat.ops):
        if op.is_array:
            held += sum(flat.sizes[v] for v in op.outputs)
            most = max(most, held + _inside(op.eqn))
        held -= ending.get(i, 0)
    end = held + sum(flat.sizes[v] for v in results if v not in last)
    return max(most, end) - sum(flat.sizes[v] for v in results)


def _inside(eqn: JaxprEqn) -> int:
    """Bytes of arrays that are held only while a loop or a branch runs."""
    if eqn.primitive.name not in LOOPS:
        return 0
    return max(map(_temporaries, _inner(eqn)))


def _inner(eqn: JaxprEqn) -> list[Jaxpr]:
    values = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple | list) else (value,))]
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in values if isinstance(x, ClosedJaxpr | Jaxpr)]


def _nbytes(var: Any) -> int:
    if isinstance(var, Literal) or not hasattr(var.aval, "dtype"):
        return 0
    return var.aval.size * getattr(var.aval.dtype, "itemsize", 4)

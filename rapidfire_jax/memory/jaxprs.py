"""What was traced, as operations on numbered values with calls inlined: what costs and memory are read off."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

KERNELS = ("pallas_call", "mpmd_map", "core_map")
LOOPS = ("scan", "while", "cond")


def inner(eqn: JaxprEqn) -> list[Jaxpr]:
    """The programs inside an equation: what it calls, bodies of loops, branches."""
    params = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr)))
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in params if isinstance(x, (ClosedJaxpr, Jaxpr))]


class Op(NamedTuple):
    """An equation on numbered values."""

    eqn: JaxprEqn
    inputs: list[int]  # without literals
    outputs: list[int]

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.eqn.primitive.name


class Inlined:
    """A program whose calls are inlined; kernels and loops are not taken apart."""

    def __init__(self, jaxpr: Jaxpr):
        self.avals: list[Any] = []  # by the number of a value
        self.ops: list[Op] = []
        self.inputs = [self._new(var) for var in jaxpr.invars]
        self.outputs = self._inline(jaxpr, dict(zip(jaxpr.invars, self.inputs, strict=True)))

    def _new(self, var: Any) -> int:
        self.avals.append(var.aval)
        return len(self.avals) - 1

    def _inline(self, jaxpr: Jaxpr, known: dict[Any, int]) -> list[int]:
        def read(variables: Iterable[Any]) -> list[int]:
            return [self._new(v) if isinstance(v, Literal) else known[v] for v in variables]

        known.update((var, self._new(var)) for var in jaxpr.constvars)
        for eqn in jaxpr.eqns:
            called = _called(eqn)
            if called is None:
                outputs = [self._new(var) for var in eqn.outvars]
                self.ops.append(Op(eqn, [known[v] for v in eqn.invars if not isinstance(v, Literal)], outputs))
            else:
                outputs = self._inline(called, dict(zip(called.invars, read(eqn.invars), strict=True)))
            known.update(zip(eqn.outvars, outputs, strict=True))
        return read(jaxpr.outvars)


def _called(eqn: JaxprEqn) -> Jaxpr | None:
    """What an equation stands for, if that is one run of it on the equation's operands."""
    if eqn.primitive.name in (*KERNELS, *LOOPS):
        return None
    parts = inner(eqn)
    return parts[0] if parts and len(parts[0].invars) == len(eqn.invars) else None

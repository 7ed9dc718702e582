"""FLOPs and bytes of a whole program, counted in what was traced: loops as often as they go round."""

import math
import re
from collections.abc import Callable
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn

from rapidfire_jax.memory.jaxprs import KERNELS, inner
from rapidfire_jax.memory.layer_costs import count_flops

_ITEMSIZE = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BUFFER = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (\w+)\[([\d,]*)\]\S* (\S+?)\((?:.*op_name=\"([^\"]*)\")?", re.MULTILINE)
_FUSED = re.compile(r"^%?(?:fused|wrapped)\S* .*?^}", re.MULTILINE | re.DOTALL)  # their values stay in registers
_VIEWS = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "constant"}


def flops(jaxpr: Jaxpr, trips: tuple[int, ...]) -> float:
    """FLOPs of the matrix products of a program that was traced without kernels.

    Args:
      jaxpr: in which every operation is plain products. Those that causality would leave out count too.
      trips: how often a loop goes round whose end depends on data: decoding; then one within it, and so on.
    """
    return _summed(jaxpr, trips, count_flops)


def moved(jaxpr: Jaxpr, trips: tuple[int, ...]) -> float:
    """Bytes of the operands and results of matrix products and kernels; what XLA fuses around them is left out."""

    def of(eqn: JaxprEqn) -> float:
        if eqn.primitive.name not in KERNELS and eqn.primitive.name != "dot_general":
            return 0.0
        arrays: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
        return float(sum(x.size * x.dtype.itemsize for x in arrays))

    return _summed(jaxpr, trips, of)


def products(jaxpr: Jaxpr, trips: tuple[int, ...]) -> float:
    """How often matrix products and kernels are called."""
    return _summed(jaxpr, trips, lambda eqn: float(eqn.primitive.name in (*KERNELS, "dot_general")))


def largest_buffers(program: str, count: int) -> list[tuple[int, str]]:
    """Bytes and origin of the largest arrays that a compiled program, as HLO text, computes."""
    found: dict[str, int] = {}
    for name, dtype, dimensions, opcode, origin in _BUFFER.findall(_FUSED.sub("", program)):
        if opcode not in _VIEWS and not origin.endswith("/while"):
            nbytes = math.prod(map(int, filter(None, dimensions.split(",")))) * _ITEMSIZE.get(dtype, 1)
            label = f"{dtype}[{dimensions}] {_where(origin) or name}"
            found[label] = max(nbytes, found.get(label, 0))
    return sorted(((nbytes, label) for label, nbytes in found.items()), reverse=True)[:count]


def _where(origin: str) -> str:
    """The end of a path through the program: the rest is the way to it."""
    return "/".join(origin.split("/")[-2:])


def _summed(jaxpr: Jaxpr, trips: tuple[int, ...], of: Callable[[JaxprEqn], float]) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, parts = eqn.primitive.name, inner(eqn)
        if name in KERNELS or not parts:
            total += of(eqn)
        elif name == "scan":
            total += eqn.params["length"] * _summed(parts[0], trips, of)
        elif name == "while":
            total += trips[0] * sum(_summed(part, trips[1:], of) for part in parts)
        elif name == "cond":
            total += max(_summed(part, trips, of) for part in parts)
        else:
            total += sum(_summed(part, trips, of) for part in parts)
    return total

"""Memory of a program by its trace alone, where no compiler for the device is at hand.

Arrays are held from where they are computed to their last use, in the order in which the program was written. What a
product, a kernel, a loop, a gather or a reduction computes is an array; everything between these is fused into what
reads it. A compiler orders better and shares buffers, but also makes copies that are not seen here.
"""

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from rapidfire_jax.memory.jaxprs import KERNELS, LOOPS, Inlined, Op, inner
from rapidfire_jax.programs import Need

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
    arguments, outputs = (sum(_nbytes(v.aval) for v in values) for values in (jaxpr.invars, jaxpr.outvars))
    return Need(arguments, _temporaries(jaxpr), outputs, min(donated, outputs))


def _is_array(op: Op) -> bool:
    return op.name.startswith(ARRAYS) and op.name not in FUSED


def _temporaries(jaxpr: Jaxpr) -> int:
    """Most bytes of computed arrays that are held at a time, beyond those of the results."""
    program = Inlined(jaxpr)
    sizes = list(map(_nbytes, program.avals))
    sources: dict[int, set[int]] = {}  # of a value that is not an array: the arrays that are read in its place
    last: dict[int, int] = {}  # of an array: when it is read last
    for i, op in enumerate(program.ops):
        read = set().union(*(sources.get(v, set()) for v in op.inputs))
        if _is_array(op):
            last.update(dict.fromkeys((*read, *op.outputs), i))
            sources.update((v, {v}) for v in op.outputs)
        else:
            sources.update((v, read) for v in op.outputs)
    results = set(program.outputs) & sources.keys()
    last.update(dict.fromkeys(set().union(*(sources[v] for v in results)), len(program.ops)))

    ending: dict[int, int] = {}  # bytes that are given back after an operation
    for v, i in last.items():
        ending[i] = ending.get(i, 0) + sizes[v]
    held = most = 0
    for i, op in enumerate(program.ops):
        if _is_array(op):
            held += sum(sizes[v] for v in op.outputs)
            most = max(most, held + _inside(op.eqn))
        held -= ending.get(i, 0)
    end = held + sum(sizes[v] for v in results if v not in last)
    return max(most, end) - sum(sizes[v] for v in results)


def _inside(eqn: JaxprEqn) -> int:
    """Bytes of arrays that are held only while a loop or a branch runs."""
    if eqn.primitive.name not in LOOPS:
        return 0
    return max(map(_temporaries, inner(eqn)))


def _nbytes(aval: Any) -> int:
    return aval.size * getattr(aval.dtype, "itemsize", 4) if hasattr(aval, "dtype") else 0

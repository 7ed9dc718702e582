"""Compiled functions that know what they take of a device's memory.

A run's programs are `Program`s: a name, a pure function, and which of its arguments are donated. What each takes is
said by the compiler, which serves devices that keep no statistics, and devices that are not there.
"""

import ctypes
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event, of programs that are loaded too

_largest = 0  # peak bytes of all programs of this process


@dataclasses.dataclass(frozen=True)
class Need:
    """Memory of one compiled program on each of its devices, bytes."""

    arguments: int
    temporaries: int
    outputs: int
    aliased: int  # outputs that are written into the memory of donated arguments
    resident: int = 0  # arrays that the device holds besides arguments and outputs

    @property
    def peak(self) -> int:
        """What the device holds while the program runs."""
        return self.arguments + self.temporaries + self.outputs - self.aliased + self.resident


def need_of(compiled: jax.stages.Compiled, resident: int = 0) -> Need:
    """What a compiled program takes, beside `resident` bytes of other arrays."""
    found: Any = compiled.memory_analysis()
    return Need(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        resident,
    )


class Program:
    """`jax.jit` of a function, under a name; every form that it is compiled in adds to `needs`.

    Args of the class:
      name: unique among the programs of a run.
      function: pure.
      donate: places of donated arguments.
      options: of the compiler.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        donate: tuple[int, ...] = (),
        options: dict[str, Any] | None = None,
    ):
        self.name, self.function, self.donate = name, function, donate
        self.needs: list[Need] = []
        self._jitted: Any = jax.jit(function, donate_argnums=donate, compiler_options=options)
        self.trace, self.lower = self._jitted.trace, self._jitted.lower  # for devices that are not there, too

    def __call__(self, *args: Any) -> Any:
        """Calls the compiled function."""
        known = self._jitted._cache_size()
        out = self._jitted(*args)
        if self._jitted._cache_size() > known:
            self._remember(args, out)
        return out

    def _remember(self, args: Any, out: Any) -> None:
        global _largest
        own = {id(x) for x in jax.tree.leaves((args, out))}
        resident = sum(_bytes(x) for x in jax.live_arrays() if id(x) not in own)
        self.needs.append(need_of(self._jitted.lower(*args).compile(), resident))  # the one that has just run
        _largest = max(_largest, self.needs[-1].peak)


def _bytes(x: jax.Array) -> int:
    """On the first device."""
    here = jax.local_devices()[0] in x.sharding.device_set
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize if here else 0


@functools.cache
def give_back_memory_of_compiling() -> None:
    """From now on, what the compiler has freed goes back to the system before a program runs, not only to malloc.

    That is about 100 MB for an iteration of PPO, compiled or loaded. Only glibc can; elsewhere nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return

    def after(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED and duration_secs > 0.1:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(after)


def peak_bytes() -> int:
    """Most memory of the first device in use so far: its own statistics, or else the largest need of any program."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return _largest

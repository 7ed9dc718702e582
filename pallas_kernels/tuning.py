"""Sizes of tiles and blocks: from a file of what was measured on the device, else from a heuristic; and the tuner.

    python -m pallas_kernels.tuning [OPERATION ...]      on the GPU: measures and writes pallas_kernels/tuned/DEVICE/

A kernel's `Config` is a frozen dataclass whose fields are declared by `choice`; a kernel asks `config_for` when traced.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.shape_specs import MODELS, random_arguments

FOLDER = Path(__file__).parent / "tuned"
EVICTING = 256 * 2**20  # bytes; several times an L2 cache


def choice(*values: int) -> Any:
    """A field of a Config with the values that the tuner may try."""
    return dataclasses.field(metadata={"choices": values})


@dataclasses.dataclass
class _Trial:
    """What the tuner prescribes, and what the traced kernels asked for."""

    prescribed: dict[str, Any]
    asked: dict[str, tuple[str, Any]]


_trial: contextvars.ContextVar[_Trial | None] = contextvars.ContextVar("trial", default=None)


def config_for[C](kernel: str, heuristic: C, **key: Any) -> C:
    """The Config of a kernel: the measured one for `key` on this device, else `heuristic`.

    Args:
      kernel: its name in compiled programs.
      heuristic: what is used where nothing was measured.
      **key: shapes, dtypes and flags on which the best Config depends.
    """
    name = ", ".join(f"{k}={v}" for k, v in sorted(key.items()))
    measured = _tuned(hopper.device_kind(), kernel).get(name)
    config = heuristic if measured is None else type(heuristic)(**measured)
    if (trial := _trial.get()) is not None:
        config = trial.prescribed.get(kernel, config)
        trial.asked[kernel] = (name, config)
    return config


@functools.cache
def _tuned(device_kind: str, kernel: str) -> dict[str, dict[str, int]]:
    path = _path(device_kind, kernel)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _path(device_kind: str, kernel: str) -> Path:
    return FOLDER / re.sub(r"\W+", "_", device_kind.lower()) / f"{kernel}.json"


@contextlib.contextmanager
def trial(**prescribed: Any) -> Iterator[dict[str, tuple[str, Any]]]:
    """Gives kernels traced in the block the Configs named; yields `{kernel: (key, Config)}` of all that asked."""
    state = _Trial(prescribed, {})
    token = _trial.set(state)
    try:
        yield state.asked
    finally:
        _trial.reset(token)


def alternatives(config: Any) -> Iterator[Any]:
    """Configs that differ from `config` in one field by one step."""
    for field in dataclasses.fields(config):
        values = sorted(field.metadata["choices"])
        here = getattr(config, field.name)
        below, above = [v for v in values if v < here][-1:], [v for v in values if v > here][:1]
        for value in below + above:
            yield dataclasses.replace(config, **{field.name: value})


def compiled(function: Callable, args: tuple) -> jax.stages.Compiled:
    """`function`, traced anew: what runs depends on more than the arguments."""
    return jax.jit(lambda *args: function(*args)).lower(*args).compile()


def seconds(program: jax.stages.Compiled, args: tuple) -> float:
    """Median time on the GPU of all kernels of a call, of which none is compilation or launch."""
    return statistics.median(sum(took for _, took in run) for run in kernel_seconds(program, args))


def tune(
    function: Callable,
    *args: Any,
    prepare: Callable[[Callable, tuple], Any] = compiled,
    measure: Callable[[Any, tuple], float] = seconds,
) -> dict[str, Any]:
    """Finds, kernel by kernel, a Config that no alternative beats by 2%, and writes it to the device's file.

    Args:
      function: calls an operation; every kernel in it is tuned.
      *args: arrays.
      prepare: traces the function; several are prepared at a time.
      measure: seconds of one call of what `prepare` returned.

    Returns:
      `{kernel: Config}`.
    """
    does_not_fit = ValueError, NotImplementedError, jax.errors.JaxRuntimeError

    def program(configs: dict[str, Any]) -> tuple[Any, dict[str, tuple[str, Any]]]:
        with trial(**configs) as asked:
            try:
                return prepare(function, args), asked
            except does_not_fit:
                return None, asked

    def took(program: Any) -> float:
        try:
            return float("inf") if program is None else measure(program, args)
        except does_not_fit:
            return float("inf")

    first, asked = program({})
    best, found = took(first), {kernel: config for kernel, (_, config) in asked.items()}
    with ThreadPoolExecutor(8) as pool:
        for kernel in found:
            seen = {found[kernel]}
            while candidates := [config for config in alternatives(found[kernel]) if config not in seen]:
                seen.update(candidates)
                programs = list(pool.map(program, [found | {kernel: config} for config in candidates]))
                times = {config: took(prepared) for config, (prepared, _) in zip(candidates, programs, strict=True)}
                fastest = min(times, key=lambda config: times[config])
                if times[fastest] > 0.98 * best:
                    break
                best, found[kernel] = times[fastest], fastest
    for kernel, config in found.items():
        _write(kernel, asked[kernel][0], config)
    return found


def kernel_seconds(program: jax.stages.Compiled, args: tuple, repeats: int = 10) -> list[list[tuple[str, float]]]:
    """Names of the kernels of a program and their times on the GPU, by CUPTI, call by call.

    Every call finds the L2 cache full of other data, which it need not write back.
    """
    from jax.experimental.mosaic.gpu import profiler

    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    other = jnp.zeros((EVICTING // 4,), jnp.int32)
    evict = jax.jit(lambda x: x.max())

    def record(calls: Callable[[], Any]) -> list[tuple[str, float]]:
        cupti._cupti_init()
        try:
            calls()
        finally:
            timings = cupti._cupti_get_timings(True)
        return timings

    def run() -> None:
        for _ in range(repeats):
            evict(other).block_until_ready()
            jax.block_until_ready(program(*args))

    evict(other).block_until_ready()
    jax.block_until_ready(program(*args))
    evicting = len(record(lambda: evict(other).block_until_ready()))
    timings = record(run)
    each, rest = divmod(len(timings), repeats)
    assert not rest, f"{len(timings)} kernels in {repeats} calls"
    runs = [timings[i : i + each] for i in range(0, len(timings), each)]
    return [[(name, milliseconds / 1e3) for name, milliseconds in run[evicting:]] for run in runs]


def _write(kernel: str, key: str, config: Any) -> None:
    path = _path(hopper.device_kind(), kernel)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[key] = dataclasses.asdict(config)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _tuned.cache_clear()


def main(names: list[str], models: Iterable[str] = MODELS) -> None:
    """Tunes the named operations, or all, at the shapes of some models."""
    from pallas_kernels.catalogue import CATALOGUE

    if reasons := hopper.why_not_hopper():
        sys.exit(f"error: {reasons[0]}")
    if unknown := set(names) - set(CATALOGUE):
        sys.exit(f"error: no operation {', '.join(sorted(unknown))}; accepted: {', '.join(CATALOGUE)}")
    for name in names or CATALOGUE:
        for model in models:
            for call in CATALOGUE[name].calls(model):
                print(f"{name}, {call.name}: {tune(call.function, *random_arguments(call))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

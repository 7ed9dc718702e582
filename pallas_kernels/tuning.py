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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import hopper

FOLDER = Path(__file__).parent / "tuned"


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


def tune(function: Callable, *args: Any, measure: Callable[[Callable, tuple], float] | None = None) -> dict[str, Any]:
    """Finds, kernel by kernel, a Config that no alternative beats by 2%, and writes it to the device's file.

    Args:
      function: calls an operation; every kernel in it is tuned.
      *args: arrays.
      measure: seconds of one call of a function, which it must trace; by default `seconds`.

    Returns:
      `{kernel: Config}`.
    """
    measure = seconds if measure is None else measure

    def attempt(configs: dict[str, Any]) -> tuple[float, dict[str, tuple[str, Any]]]:
        with trial(**configs) as asked:
            try:
                return measure(jax.jit(lambda *a: function(*a)), args), asked
            except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):  # does not fit
                return float("inf"), asked

    best, asked = attempt({})
    found = {kernel: config for kernel, (_, config) in asked.items()}
    for kernel in found:
        pending = list(alternatives(found[kernel]))
        seen = {found[kernel]}
        while pending:
            config = pending.pop()
            if config in seen:
                continue
            seen.add(config)
            took, _ = attempt(found | {kernel: config})
            if took < 0.98 * best:
                best, found[kernel] = took, config
                pending = list(alternatives(config))
    for kernel, config in found.items():
        _write(kernel, asked[kernel][0], config)
    return found


def seconds(function: Callable, args: tuple, repeats: int = 10) -> float:
    """Median time on the GPU of all kernels of a call, of which none is compilation or launch."""
    from jax.experimental.mosaic.gpu import profiler

    _, milliseconds = profiler.measure(function, iterations=repeats)(*args)
    assert milliseconds is not None
    return statistics.median(milliseconds) / 1e3


def _write(kernel: str, key: str, config: Any) -> None:
    path = _path(hopper.device_kind(), kernel)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[key] = dataclasses.asdict(config)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _tuned.cache_clear()


def main(names: list[str]) -> None:
    """Tunes the named operations, or all, at the shapes of every model."""
    from pallas_kernels.catalogue import CATALOGUE
    from pallas_kernels.shape_specs import MODELS, random_arguments

    if reasons := hopper.why_not_hopper():
        sys.exit(f"error: {reasons[0]}")
    if unknown := set(names) - set(CATALOGUE):
        sys.exit(f"error: no operation {', '.join(sorted(unknown))}; accepted: {', '.join(CATALOGUE)}")
    for name in names or CATALOGUE:
        for model in MODELS:
            for call in CATALOGUE[name].calls(model):
                print(f"{name}, {call.name}: {tune(call.function, *random_arguments(call))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

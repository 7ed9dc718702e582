"""What the programs of a run need on a device that is not there, by compiling them for it where that can be done."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import dispatch, hopper
from rapidfire_jax.config import OnlineRunConfig, load_config
from rapidfire_jax.memory.devices import Device
from rapidfire_jax.planning.abstract import abstract_run
from rapidfire_jax.planning.costs import flops, largest_buffers, moved, products
from rapidfire_jax.planning.estimate import estimate
from rapidfire_jax.programs import Need, Program, need_of
from rapidfire_jax.rollout.generate import loop_trips
from rapidfire_jax.training.remat import Fitted, fit_plan

LARGEST = 5  # buffers of a program that are listed
AT_ONCE = 2  # programs that are compiled at the same time: the compiler works in one thread, and the largest are two
HOPPER = ("h100-80gb", "h200")  # devices that programs are compiled for


@dataclasses.dataclass(frozen=True)
class ProgramFit:
    """One program: memory, work, the least time that the work can take, and what it is expected to take."""

    name: str
    need: Need
    flops: float
    bytes_accessed: float
    seconds: float
    expected_seconds: float
    times: int  # that an iteration calls it
    largest: list[tuple[int, str]]  # bytes and origin of the largest buffers

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        need = self.need
        return {
            "peak_bytes": need.peak,
            "argument_bytes": need.arguments,
            "temp_bytes": need.temporaries,
            "output_bytes": need.outputs,
            "donated_bytes": need.aliased,
            "resident_bytes": need.resident,
            "flops": self.flops,
            "bytes_accessed": self.bytes_accessed,
            "floor_seconds": self.seconds,
            "expected_seconds": self.expected_seconds,
            "calls_an_iteration": self.times,
            "largest_buffers": [{"bytes": nbytes, "what": what} for nbytes, what in self.largest],
        }


@dataclasses.dataclass(frozen=True)
class Fit:
    """A run on a device."""

    device: Device
    programs: list[ProgramFit]
    remat: Fitted | None  # what `memory.remat: auto` chose
    estimated: list[str]  # why it was not compiled; empty if it was

    @property
    def peak(self) -> int:
        """Most bytes that any program has the device hold."""
        return max(program.need.peak for program in self.programs)

    @property
    def iteration_seconds(self) -> float:
        """What an iteration is expected to take, rewards on the host and waiting for them left out."""
        return sum(program.times * program.expected_seconds for program in self.programs)

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.peak <= self.device.memory

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "fits": self.fits,
            "peak_bytes": self.peak,
            "expected_iteration_seconds": self.iteration_seconds,
            "device": self.device.name,
            "device_bytes": self.device.memory,
            "estimated": self.estimated,
            "remat": None if self.remat is None else self.remat.record(),
            "programs": {program.name: program.record() for program in self.programs},
        }


def why_estimated(device: Device) -> list[str]:
    """Why programs cannot be compiled for a device here; empty if they can."""
    if device.name not in HOPPER:
        return [f"programs can be compiled for {' and '.join(HOPPER)}"]
    return hopper.toolchain()


def fit(config: OnlineRunConfig, device: Device, tell: Callable[[str], None] = lambda name: None) -> Fit:
    """What a run takes on a device, compiled or, for `why_estimated`, estimated from what was traced.

    Args:
      config: of the run.
      device: need not be here.
      tell: hears the name of each program before it is compiled.

    Raises:
      InputError: see `abstract_run`.
    """
    run, chosen, reasons = abstract_run(config, device.dtype), None, why_estimated(device)
    need = functools.partial(_estimated if reasons else _compiled, device)
    if config.memory.remat == "auto":
        tell("remat plan")
        left = dataclasses.replace(device, memory=device.memory - _bytes(run.rewards))
        programs_of = functools.cache(run.recipe.programs)
        args = run.recipe.largest(programs_of(run.policy).rollout, run.state)["learn"]
        learn = lambda policy: programs_of(policy).learn  # noqa: E731
        with jax.sharding.use_abstract_mesh(_mesh(device)):
            policy, chosen = fit_plan(run.policy, learn, args, config.memory, left, lambda *call: need(*call).need)
        run = dataclasses.replace(run, policy=policy)
    trips, times = loop_trips(config.rollout.batch_size, run.recipe.sampling), run.times()

    def fit_one(call: tuple[str, tuple[Program, tuple[Any, ...]]]) -> ProgramFit:
        name, (program, args) = call
        tell(name)
        own = {id(x) for x in jax.tree.leaves(args)}
        resident = sum(_bytes(x) for x in jax.tree.leaves((run.state, run.rewards)) if id(x) not in own)
        found = need(program, args)
        with dispatch.prefer("xla", "chunked", "scan"):
            work = flops(jax.make_jaxpr(program.function)(*args).jaxpr, trips)
        traced = _traced(device, program, args).jaxpr
        nbytes = moved(traced, trips)
        seconds = device.seconds(work, nbytes, device.dtype)
        expected = device.expected_seconds(work, nbytes, products(traced, trips), device.dtype)
        complete = dataclasses.replace(found.need, resident=resident)
        return ProgramFit(name, complete, work, nbytes, seconds, expected, times[name], found.largest)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        programs = list(pool.map(fit_one, run.calls().items()))
    return Fit(device, programs, chosen, reasons)


class _Found(NamedTuple):
    need: Need
    largest: list[tuple[int, str]]


def _compiled(device: Device, program: Program, args: tuple[Any, ...]) -> _Found:
    compiled = hopper.compile_for_h100(program, *args)
    return _Found(need_of(compiled), largest_buffers(compiled.as_text() or "", LARGEST))


def _estimated(device: Device, program: Program, args: tuple[Any, ...]) -> _Found:
    donated = sum(_bytes(args[i]) for i in program.donate)
    return _Found(estimate(_traced(device, program, args), donated), [])


def _traced(device: Device, program: Program, args: tuple[Any, ...]) -> ClosedJaxpr:
    """As it would run on the device, with the kernels that it has."""
    with jax.sharding.use_abstract_mesh(_mesh(device)):
        return jax.jit(program.function).trace(*args).jaxpr  # not the jitted one: that remembers other devices' traces


def _mesh(device: Device) -> AbstractMesh:
    described = AbstractDevice(device_kind=device.kind, num_cores=device.cores, platform=device.platform)
    return AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=described)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Settings that were tried, and what the run takes with them."""

    overrides: tuple[str, ...]
    peak: int
    fits: bool


def remedies(
    path: Path, overrides: list[str], config: OnlineRunConfig, device: Device, tell: Callable[[str], None]
) -> Iterator[Remedy]:
    """Tries settings that save memory: one after the other, each on top of those before, until the run fits."""
    taken: tuple[str, ...] = ()
    for settings in _savings(config):
        taken = (*taken, *settings.split())
        tell(f"with {settings}")
        found = fit(load_config(path, [*overrides, *taken]), device, tell)
        yield Remedy(taken, found.peak, found.fits)
        if found.fits:
            return


def _savings(config: OnlineRunConfig) -> list[str]:
    """Settings that save memory, those that cost least first."""
    found = []
    if config.rollout.cache is None:
        found.append("rollout.cache=int8")
    if config.memory.remat in ("none", "products", "dots"):
        found.append("memory.remat=full")
    rows = config.rollout.batch_size // config.settings.minibatches
    if config.settings.micro_batches < rows:
        found.append(f"rl.micro_batches={rows}")
    if config.adapter.type == "none":
        found.append("adapter.type=lora")
    if config.model.quantize is None:
        found.append("model.quantize=nf4")
    if config.model.quantize_vocabulary is None:
        found.append("model.quantize_vocabulary=int8")
    if config.rollout.batch_size >= 2 * config.settings.minibatches:
        half = config.rollout.batch_size // 2
        found.append(f"rollout.batch_size={half} rl.micro_batches={max(half // config.settings.minibatches, 1)}")
    return found

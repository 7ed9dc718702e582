"""The target of the kernels, an NVIDIA Hopper GPU, also on a machine that has none. Three depths:

    with simulated():                      runs kernels on the CPU: threads, barriers, copies and wgmma, races found
        out = rms_norm(x, scale)
    lower(rms_norm, x, scale)              StableHLO and Mosaic modules for an H100; needs nothing but jax
    compile_for_h100(rms_norm, x, scale)   XLA's program and sm_90a machine code; needs the packages of `toolchain()`

`kernel_counts` says which kernels a program contains and how often; `machine_code` what each costs in registers, spills
and shared memory.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src import config as jax_config
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

DEVICE_KIND = "NVIDIA H100 80GB HBM3"
SHARED_MEMORY = 227 * 1024  # bytes a block may use
BANDWIDTH = 3.35e12  # bytes a second of device memory
BF16_RATE = 990e12  # dense FLOP a second
CORES = 132  # streaming multiprocessors

# What XLA asks the driver on a machine that has the card.
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

if not Path("/dev/nvidiactl").exists():
    # Without a driver and CUDA's libraries jax would not register its CUDA plugin, and so its compiler, at first use.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

_HOPPER = re.compile(r"\b(G?H100|G?H200|H800|H20)\b")


class RaceError(AssertionError):
    """Two accesses of a simulated kernel to the same memory have no order between them."""


# Where a call would run


def is_simulated() -> bool:
    """Whether code traced here goes to the simulator."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


def device_kind() -> str:
    """Name of the device that code traced here is for: the simulated one, that of the abstract mesh, or the first."""
    if is_simulated():
        return DEVICE_KIND
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.device_kind
    default = jax.config.jax_default_device
    return default.device_kind if isinstance(default, jax.Device) else jax.devices(default)[0].device_kind


def why_not_hopper() -> list[str]:
    """Empty if code traced here is for a Hopper GPU, else the reason why Mosaic kernels cannot run."""
    kind = device_kind()
    if _HOPPER.search(kind):
        return []
    return [
        f"the device is {kind!r}; Mosaic kernels need a Hopper GPU (H100, H200), or pallas_kernels.hopper.simulated()"
    ]


def cores() -> int:
    """Multiprocessors of the device that code traced here is for.

    The simulated one has two: every block of a simulated kernel is compiled anew, and blocks that stay for several
    pieces of work should have several.
    """
    if is_simulated():
        return 2
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is None:
        device = jax.devices()[0]
        return device.core_count if device.platform == "gpu" else CORES
    return abstract.num_cores


# Simulated


@contextlib.contextmanager
def simulated(*, detect_races: bool = True) -> Iterator[None]:
    """Runs every Mosaic kernel traced in the block on the CPU, as if the device were an H100.

    A kernel's warpgroups wait for each other in threads of XLA, which has one a core. On a machine with fewer than four
    cores, set the environment variable NPROC=16 before jax starts, or kernels of several warpgroups may never end.

    Where the device is a Hopper GPU there is nothing to simulate, and kernels run on it.

    Raises:
      RaceError: a race was found; says which accesses of what memory, by which threads.
    """
    if not why_not_hopper():
        yield
        return
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulator

    simulator.reset_gpu_interpret_mode_state()
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
            jax.effects_barrier()
        if detect_races and _races_found(simulator):
            raise RaceError("the simulator found a data race; it printed the accesses")
    except jax.errors.JaxRuntimeError as error:
        if "RACE DETECTED" not in str(error):
            raise
        raise RaceError(str(error).partition("RACE DETECTED")[2].strip()) from None
    finally:
        simulator.reset_gpu_interpret_mode_state()


def _races_found(simulator: Any) -> bool:
    """Before 0.12 jax remembers a race instead of raising an error."""
    try:
        races = simulator.get_races()
    except AssertionError:  # no kernel ran
        return False
    return races is not None and races.races_found


# Lowered


def abstract_mesh(devices: int = 1) -> AbstractMesh:
    """A mesh of H100s, axis "d"; `jax.sharding.use_abstract_mesh` makes it the target of what is traced."""
    device = AbstractDevice(device_kind=DEVICE_KIND, num_cores=CORES, platform="gpu")
    return AbstractMesh((devices,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)


def lower(function: Callable, *args: Any, devices: int = 1, **kwargs: Any) -> jax.stages.Lowered:
    """Traces and lowers `function` for H100s. Arguments are arrays or `jax.ShapeDtypeStruct`s; jitted or not."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with jax.sharding.use_abstract_mesh(abstract_mesh(devices)):
        return jitted.trace(*args, **kwargs).lower(lowering_platforms=("cuda",))


def kernel_counts(lowered: jax.stages.Lowered) -> collections.Counter[str]:
    """How often each Mosaic kernel stands in the program; the body of a loop counts once."""
    module = lowered.compiler_ir("stablehlo")
    assert module is not None
    functions = {op.attributes["sym_name"].value: op for op in _operations(module.operation) if op.name == "func.func"}

    def count(op: Any) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        for inner in _operations(op):
            if inner.name == "stablehlo.custom_call" and "mosaic_gpu" in str(inner.attributes["call_target_name"]):
                match = re.search(r"([\w.]+)/mpmd_map", str(inner.location))
                found[match[1] if match else "unnamed"] += 1
            elif inner.name == "func.call":
                found += count(functions[inner.attributes["callee"].value])
            else:
                found += count(inner)
        return found

    return count(functions["main"])


def _operations(op: Any) -> Iterator[Any]:
    for region in op.regions:
        for block in region:
            for inner in block:
                yield inner.operation


# Compiled


def toolchain() -> list[str]:
    """What is missing to compile for an H100 on this machine; empty if nothing is."""
    missing = [
        f"Python package {name.replace('_', '-')} is not installed"
        for name in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13")
        if not _installed(name)
    ]
    if _ptxas() is None:
        missing.append("ptxas is neither on the PATH nor installed with the Python package nvidia-cuda-nvcc")
    return missing


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _ptxas() -> str | None:
    if found := shutil.which("ptxas"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        for path in Path(folder).glob("*/bin/ptxas"):
            return str(path)
    return None


def mesh(devices: int = 1) -> jax.sharding.Mesh:
    """A mesh of H100s that are not there, axis "d", for which XLA can compile.

    Raises:
      NotImplementedError: what `toolchain` says is missing.
    """
    if missing := toolchain():
        raise NotImplementedError(f"cannot compile for an H100 here: {'; '.join(missing)}")
    with _one_at_a_time:
        return _mesh(devices)


_one_at_a_time = threading.Lock()


@functools.cache
def _mesh(devices: int) -> jax.sharding.Mesh:
    import jax._src.xla_bridge as bridge
    from jax.experimental import topologies

    os.environ["PATH"] += os.pathsep + str(Path(_ptxas() or "").parent)
    canonical = bridge.canonicalize_platform
    bridge.canonicalize_platform = lambda platform: (
        "cuda" if platform == "gpu" else canonical(platform)
    )  # jax issue 23971
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=_TARGET, topology=f"1x1x{devices}"
        )
        return topologies.make_mesh(described, (devices,), ("d",))
    finally:
        bridge.canonicalize_platform = canonical


def compile_for_h100(function: Callable, *args: Any, devices: int = 1, **kwargs: Any) -> jax.stages.Compiled:
    """Compiles `function` for H100s down to machine code, without one. Arguments without a sharding are replicated.

    The persistent compilation cache has no part in it: a program that is loaded from there was not compiled. Threads
    may compile at the same time.

    Raises:
      NotImplementedError: see `toolchain`.
    """
    from jax._src.config import enable_compilation_cache

    target = mesh(devices)

    def place(x: Any) -> Any:
        if not hasattr(x, "shape") or isinstance(getattr(x, "sharding", None), NamedSharding):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(target, PartitionSpec()))

    args, kwargs = jax.tree.map(place, (args, kwargs))
    with enable_compilation_cache(False):
        return lower(function, *args, devices=devices, **kwargs).compile()


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel occupies."""

    kernel: str
    registers: int  # a thread
    spill_bytes: int  # stores and loads a thread
    shared_bytes: int  # a block


def machine_code(function: Callable, *args: Any, **kwargs: Any) -> list[MachineCode]:
    """Compiles `function` for an H100 and reports each of its Mosaic kernels.

    Raises:
      NotImplementedError: see `toolchain`.
      RuntimeError: a kernel had been compiled before in this process, and so was not now.
    """
    jax.clear_caches()  # a kernel that was lowered before would not be reported
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            compile_for_h100(function, *args, **kwargs)
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        # XLA and Mosaic number the kernels of a module apart; both number them in the order of the program.
        found = [_dumped(Path(folder), kind) for kind in (".ptxas", ".resources.txt")]
        compiled, lowered = ([kernel for kernel, _ in each] for each in found)
        if compiled != lowered:
            raise RuntimeError(f"of {', '.join(lowered)} some had been compiled before; now: {', '.join(compiled)}")
        return [_report(kernel, said, used) for (kernel, said), (_, used) in zip(*found, strict=True)]


def _dumped(folder: Path, kind: str) -> list[tuple[str, str]]:
    names = [re.fullmatch(rf"(.*)_(\d+){re.escape(kind)}", path.name) for path in folder.iterdir()]
    numbered = sorted((match[1], int(match[2]), match[0]) for match in names if match)
    return [(kernel, (folder / name).read_text(encoding="utf-8")) for kernel, _, name in numbered]


def _report(kernel: str, said: str, resources: str) -> MachineCode:
    registers = re.search(r"Used (\d+) registers", said)
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources)
    assert registers and shared, f"{said}\n{resources}"
    return MachineCode(
        kernel=kernel,
        registers=int(registers[1]),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        shared_bytes=int(shared[1]),
    )

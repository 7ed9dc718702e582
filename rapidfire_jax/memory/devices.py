"""What devices have and how fast they are: the right-hand side of every estimate."""

import dataclasses
import difflib
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import hopper
from rapidfire_jax.errors import InputError

GIB = 2**30
OF_RATE, OF_BANDWIDTH, A_LAUNCH = 0.6, 0.9, 3e-6  # fitted to the runs of `benchmarks.one_gpu` at 8 B
_PCIE_4, _PCIE_5 = 31.5e9, 63e9  # 16 lanes, one direction
_HOPPER = hopper.BF16_RATE, hopper.BF16_RATE / 2, _PCIE_5, hopper.CORES


@dataclasses.dataclass(frozen=True)
class Device:
    """One device. Rates are peaks: dense matrix products, float32 sums; what a program reaches is a share of them."""

    name: str  # by which `find_device` finds it
    kind: str  # as jax says it, `jax.Device.device_kind`
    memory: int  # bytes that programs can have, a little less than what is printed on the box
    bandwidth: float  # bytes a second of that memory, reading and writing together
    bf16_rate: float  # FLOP a second, operands of 16 bits
    float32_rate: float  # the same, float32 operands as jax multiplies them by default: TF32 on a GPU
    host_bandwidth: float | None  # bytes a second to the host's memory, one way; None: it is the host
    cores: int  # multiprocessors

    @property
    def platform(self) -> str:
        """As jax says it."""
        return "cpu" if self.host_bandwidth is None else "gpu"

    @property
    def dtype(self) -> str:
        """In which it multiplies best; see `rapidfire_jax.models.precision.hardware_dtype`."""
        return "float32" if self.platform == "cpu" else "bfloat16"

    def rate(self, dtype: DTypeLike) -> float:
        """FLOP a second of products of this dtype."""
        return self.bf16_rate if jnp.dtype(dtype).itemsize <= 2 else self.float32_rate

    def seconds(self, flops: float, nbytes: float, dtype: DTypeLike) -> float:
        """Roofline: the longer of computing and moving, `max(flops / rate, bytes / bandwidth)`."""
        return max(flops / self.rate(dtype), nbytes / self.bandwidth)

    def expected_seconds(self, flops: float, nbytes: float, products: float, dtype: DTypeLike) -> float:
        """What a program of this work and so many matrix products and kernels takes, one after the other.

        At shares of the peaks that fit whole programs of training and decoding on an H100; elsewhere untried.
        """
        launches = 0.0 if self.platform == "cpu" else products * A_LAUNCH
        return flops / (OF_RATE * self.rate(dtype)) + nbytes / (OF_BANDWIDTH * self.bandwidth) + launches


DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", "NVIDIA A100-SXM4-40GB", int(39.4 * GIB), 1.555e12, 312e12, 156e12, _PCIE_4, 108),
        Device("a100-80gb", "NVIDIA A100-SXM4-80GB", int(79.1 * GIB), 2.039e12, 312e12, 156e12, _PCIE_4, 108),
        Device("h100-80gb", hopper.DEVICE_KIND, int(79.1 * GIB), hopper.BANDWIDTH, *_HOPPER),
        Device("h200", "NVIDIA H200", int(139.8 * GIB), 4.8e12, *_HOPPER),
        Device("b200", "NVIDIA B200", int(178.3 * GIB), 8.0e12, 2250e12, 1125e12, _PCIE_5, 148),
        Device("l40s", "NVIDIA L40S", int(44.4 * GIB), 0.864e12, 362e12, 183e12, _PCIE_4, 142),
        Device("rtx4090", "NVIDIA GeForce RTX 4090", int(23.6 * GIB), 1.008e12, 165e12, 82.6e12, _PCIE_4, 128),
    )
}


def find_device(name: str) -> Device:
    """The device of a name: one of `DEVICES`, or "cpu", this machine's, whose rates are measured now.

    Raises:
      InputError: no such name; says the nearest one and all.
    """
    if name == "cpu":
        return measured_cpu()
    if name not in DEVICES:
        known = (*DEVICES, "cpu")
        nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(f"device {name!r} is not known; {hint}known: {', '.join(known)}")
    return DEVICES[name]


def present_device() -> Device:
    """The device that jax uses by default. A GPU of the same model in another form (PCIe, NVL) counts as the one known.

    Raises:
      InputError: a device of which nothing is known.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return measured_cpu()
    memory = (device.memory_stats() or {}).get("bytes_limit")
    models = [known for known in DEVICES.values() if known.name.partition("-")[0] in _letters(device.device_kind)]
    if not models:
        raise InputError(f"nothing is known of the device {device.device_kind!r}; known: {', '.join(DEVICES)}")
    nearest = min(models, key=lambda known: abs(known.memory - (memory or known.memory)))
    return dataclasses.replace(nearest, kind=device.device_kind, memory=memory or nearest.memory)


def _letters(kind: str) -> str:
    return kind.lower().replace(" ", "")


@functools.cache
def measured_cpu() -> Device:
    """The CPU of this machine. Its rates are the best of a few short tries, once a process: about half a second."""
    size = 1024
    square, vector = (lambda dtype: jnp.ones((size, size), dtype)), jnp.ones((2**24,), jnp.float32)
    product = jax.jit(lambda x: x @ x, donate_argnums=0)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: a new array costs page faults besides
    return Device(
        name="cpu",
        kind=jax.local_devices(backend="cpu")[0].device_kind,
        memory=_host_memory(),
        bandwidth=2 * vector.nbytes / _best_seconds(copy, vector),
        bf16_rate=2 * size**3 / _best_seconds(product, square(jnp.bfloat16)),
        float32_rate=2 * size**3 / _best_seconds(product, square(jnp.float32)),
        host_bandwidth=None,
        cores=len(os.sched_getaffinity(0)),
    )


def _best_seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    x = jax.block_until_ready(function(jax.device_put(x, jax.local_devices(backend="cpu")[0])))
    tries = []
    for _ in range(5):
        began = time.perf_counter()
        x = jax.block_until_ready(function(x))
        tries.append(time.perf_counter() - began)
    return min(tries)


def _host_memory() -> int:
    """Bytes of this machine, or of the container if that has less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).exists() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits)

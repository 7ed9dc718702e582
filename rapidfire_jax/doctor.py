"""What this machine has, and which kernels would run on it."""

import importlib.metadata
import platform
from typing import Any

import jax
import rich
import rich.table

from pallas_kernels import dispatch, hopper
from pallas_kernels.catalogue import CATALOGUE

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "transformers")


def examine(model: str = "8b") -> dict[str, Any]:
    """Everything `rapidfire doctor` says, as JSON values; kernels as a model of this size would call them."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": [_device(device) for device in jax.devices()],
        "compiler_for_h100": {"missing": hopper.toolchain()},
        "against_kernels": hopper.why_not_hopper(),
        "model": model,
        "kernels": _kernels(model),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: jax.Device) -> dict[str, Any]:
    stats = device.memory_stats() or {}
    return {"kind": device.device_kind, "platform": device.platform, "memory_bytes": stats.get("bytes_limit")}


def _kernels(model: str) -> list[dict[str, Any]]:
    found = []
    for entry in CATALOGUE.values():
        for call in entry.calls(model):
            with dispatch.record() as choices:
                jax.eval_shape(lambda *args, call=call: call.function(*args), *call.args)
            found.append({"call": call.name, **choices[0]._asdict()})
    return found


def show(found: dict[str, Any]) -> None:
    """Prints what `examine` found as tables."""
    versions = {"python": found["python"]} | found["packages"]
    rich.print(", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()))
    for device in found["devices"]:
        memory = device["memory_bytes"]
        size = "" if memory is None else f", {memory / 2**30:.0f} GiB"
        rich.print(f"device: {device['kind']} ({device['platform']}{size})")
    missing = found["compiler_for_h100"]["missing"]
    rich.print("compiler for an H100: " + ("here" if not missing else "; ".join(missing)))
    if of_device := found["against_kernels"]:
        rich.print("no Hopper kernel runs here: " + "; ".join(of_device))
    title = f"Operations at the shapes of a model of size {found['model']}"
    table = rich.table.Table("call", "runs", "also against the kernel" if of_device else "because", title=title)
    for row in found["kernels"]:
        reasons = [
            f"{name}: {reason}"
            for name, all_of_it in row["against"].items()
            for reason in all_of_it
            if reason not in of_device
        ]
        table.add_row(f"{row['operation']}: {row['call']}", row["implementation"], "\n".join(reasons))
    rich.print(table)

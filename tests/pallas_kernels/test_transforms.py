"""vmap, checkpoint, grad and shard_map through every operation, with XLA and with the kernel in the simulator."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import hopper, rms_norm
from pallas_kernels.catalogue import CATALOGUE
from tests.helpers.kernels import assert_close, normal
from tests.helpers.tolerances import KERNEL

ROOT = Path(__file__).parents[2]
DEVICES = 8


class Example(NamedTuple):
    """A call with leading batch axis 8 on the mapped arguments."""

    function: Callable[..., Any]  # (*args, implementation=)
    args: tuple
    mapped: tuple[bool, ...]  # which arguments have the batch axis
    differentiable: tuple[int, ...]


EXAMPLES = {
    "rms_norm": Example(rms_norm, (normal(0, (DEVICES, 2, 256)), normal(1, (256,))), (True, False), (0, 1)),
}


def test_every_operation_has_an_example():
    assert EXAMPLES.keys() == CATALOGUE.keys()


def row(example: Example, i: int) -> tuple:
    """Arguments of one element of the batch."""
    return tuple(jax.tree.map(lambda x: x[i], a) if m else a for a, m in zip(example.args, example.mapped, strict=True))


def scalar(function: Callable[..., Any], example: Example) -> Callable[..., jax.Array]:
    """A loss whose gradient involves every output."""

    def loss(*args: Any) -> jax.Array:
        out = jax.tree.leaves(function(*args))
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in out if jnp.issubdtype(x.dtype, jnp.floating))

    return jax.value_and_grad(loss, example.differentiable) if example.differentiable else loss


def both(name: str, of: Callable[[Callable[..., Any]], Any]) -> None:
    """`of(function)` with the kernel in the simulator agrees with the same under XLA."""
    example = EXAMPLES[name]
    with hopper.simulated():
        found = of(partial(example.function, implementation="mosaic_gpu"))
    assert_close(found, of(example.function), max(KERNEL[name].values()))


@pytest.mark.parametrize("name", EXAMPLES)
def test_vmap(name):
    example = EXAMPLES[name]
    axes = tuple(0 if m else None for m in example.mapped)
    few = tuple(jax.tree.map(lambda x: x[:2], a) if m else a for a, m in zip(example.args, example.mapped, strict=True))

    def mapped(function):
        return jax.vmap(scalar(function, example), axes)(*few)

    both(name, mapped)
    one_by_one = [scalar(example.function, example)(*row(example, i)) for i in range(2)]
    assert_close(mapped(example.function), jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), 1e-5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_checkpoint(name):
    """The simulator has effects, which `jax.checkpoint` refuses; the kernel's program is lowered instead."""
    example, args = EXAMPLES[name], row(EXAMPLES[name], 0)
    remat = jax.jit(scalar(jax.checkpoint(example.function), example))
    assert_close(remat(*args), scalar(example.function, example)(*args), 1e-5)
    plain, again = (hopper.kernel_counts(hopper.lower(f, *args)) for f in (scalar(example.function, example), remat))
    assert plain and all(again[kernel] >= n for kernel, n in plain.items())


@pytest.mark.parametrize("name", EXAMPLES)
def test_shard_map_over_eight_devices(name):
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    code = f"from tests.pallas_kernels.test_transforms import shard; shard({name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts and all(n >= 1 for n in counts.values())


def shard(name: str) -> None:
    """One element of the batch a device, with XLA and simulated; then lowered for eight H100s."""
    example = EXAMPLES[name]
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    specs = tuple(PartitionSpec("d") if m else PartitionSpec() for m in example.mapped)

    def spread(function, mesh):
        def one(*args):
            args = [jax.tree.map(lambda x: x[0], a) if m else a for a, m in zip(args, example.mapped, strict=True)]
            # Gradients of what all devices share have been summed by autodiff.
            return jax.tree.map(
                lambda x: jax.lax.psum(x, "d") if hopper.varying_axes(x) else x, scalar(function, example)(*args)
            )

        return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))

    def summed(function):
        each = [scalar(function, example)(*row(example, i)) for i in range(DEVICES)]
        return jax.tree.map(lambda *x: jnp.sum(jnp.stack(x), axis=0), *each)

    both(name, lambda function: spread(function, mesh)(*example.args))
    assert_close(spread(example.function, mesh)(*example.args), summed(example.function), 1e-4)
    target = hopper.abstract_mesh(DEVICES)
    with jax.sharding.use_abstract_mesh(target):
        lowered = spread(example.function, target).trace(*example.args).lower(lowering_platforms=("cuda",))
    print(json.dumps(hopper.kernel_counts(lowered)))

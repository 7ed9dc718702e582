"""vmap, checkpoint, grad and shard_map through every operation, with XLA and with the kernel in the simulator."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import (
    Moments,
    adamw_8bit,
    decode_attention,
    flash_attention,
    gae,
    hopper,
    init_moments,
    linear_logprob,
    ppo_loss,
    quantize,
    quantized_matmul,
    rms_norm,
    sample,
)
from pallas_kernels.catalogue import CATALOGUE
from pallas_kernels.launch import varying_axes
from tests.helpers.agreement import assert_close, normal
from tests.helpers.cases import spread
from tests.helpers.devices import on_eight_devices
from tests.helpers.tolerances import KERNEL

DEVICES = 8


class Example(NamedTuple):
    """A call with leading batch axis 8 on the mapped arguments."""

    function: Callable[..., Any]  # (*args, implementation=)
    args: tuple
    mapped: tuple[bool, ...]  # which arguments have the batch axis
    differentiable: tuple[int, ...]


def bf16(seed: int, *shape: int) -> jax.Array:
    return normal(seed, shape, jnp.bfloat16)


def attend(q, k, v, segments, implementation=None):
    return flash_attention(q, k, v, segments=segments, implementation=implementation)


def multiply(x, codes, scale, implementation=None):
    return quantized_matmul(x, dataclasses.replace(WEIGHTS, codes=codes, scale=scale), implementation=implementation)


def draw(logits, key, implementation=None):
    return sample(logits, jax.random.wrap_key_data(key), implementation=implementation)


def loss(logp, entropy, v, old_logp, adv, implementation=None):
    return ppo_loss(
        logp,
        entropy,
        v,
        mask_t=adv > -1.0,
        old_logp_t=old_logp,
        adv_t=adv,
        clip_low=0.2,
        clip_high=0.2,
        old_v_t=old_logp,
        return_t=adv,
        entropy_coef=0.1,
        implementation=implementation,
    ).total


def estimate(r, v, mask, implementation=None):
    return gae(r, v, mask, 0.99, 0.95, implementation=implementation)


def optimise(param, grad, *moments, implementation=None):
    new, after = adamw_8bit(param, grad, Moments(*moments), step=3, learning_rate=0.01, implementation=implementation)
    return new, after.m_scales, after.v_scales


N = DEVICES
WEIGHTS = quantize(normal(9, (128, 128)), "int8")
MOMENTS = jax.tree.map(lambda x: jnp.broadcast_to(x, (N, *x.shape)), init_moments(jnp.zeros((8, 256))))
TOKENS = jnp.arange(N * 16, dtype=jnp.int32).reshape(N, 16)
EXAMPLES = {
    "rms_norm": Example(rms_norm, (normal(0, (N, 2, 256)), normal(1, (256,))), (True, False), (0, 1)),
    "flash_attention": Example(
        attend,
        (bf16(0, N, 1, 72, 2, 64), bf16(1, N, 1, 72, 1, 64), bf16(2, N, 1, 72, 1, 64), jnp.ones((N, 1, 72), jnp.int32)),
        (True,) * 4,
        (0, 1, 2),
    ),
    "decode_attention": Example(
        decode_attention,
        (bf16(0, N, 2, 4, 64), bf16(1, N, 2, 2, 72, 64), bf16(2, N, 2, 2, 72, 64), TOKENS[:, 1:3] % 72 + 1),
        (True,) * 4,
        (),
    ),
    "linear_logprob": Example(
        linear_logprob, (0.1 * bf16(0, N, 16, 64), bf16(1, 192, 64), TOKENS % 192), (True, False, True), (0, 1)
    ),
    "quantized_matmul": Example(
        multiply, (0.1 * bf16(0, N, 3, 128), WEIGHTS.codes, WEIGHTS.scale), (True, False, False), (0,)
    ),
    "sampling": Example(
        draw,
        (normal(0, (N, 2, 1024)), jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(3), N))),
        (True, True),
        (),
    ),
    "ppo_loss": Example(loss, tuple(normal(i, (N, 2, 48), scale=0.1) for i in range(5)), (True,) * 5, (0, 1, 2)),
    "gae": Example(
        estimate, (normal(0, (N, 3, 40)), normal(1, (N, 3, 40)), normal(2, (N, 3, 40)) > -1.0), (True,) * 3, (0, 1)
    ),
    "adamw_8bit": Example(optimise, (normal(0, (N, 8, 256)), normal(1, (N, 8, 256)), *MOMENTS), (True,) * 6, ()),
}
# The simulator mixes up barriers of different devices: on several, these kernels are lowered only.
WITH_BARRIERS = {"flash_attention", "decode_attention", "linear_logprob", "quantized_matmul"}


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


def tolerance(name: str) -> float:
    """Of results that are computed from the same inputs in another order: both sides round, hence twice."""
    return max(2 * KERNEL[name][str(EXAMPLES[name].args[0].dtype)], 2e-5)


def both(name: str, of: Callable[[Callable[..., Any]], Any], *, detect_races: bool = True) -> None:
    """`of(function)` with the kernel in the simulator agrees with the same under XLA."""
    example = EXAMPLES[name]
    with hopper.simulated(detect_races=detect_races):
        found = of(partial(example.function, implementation="mosaic_gpu"))
    assert_close(found, of(example.function), tolerance(name))


@pytest.mark.parametrize("name", spread(EXAMPLES, 5))
def test_vmap(name):
    example = EXAMPLES[name]
    axes = tuple(0 if m else None for m in example.mapped)
    few = tuple(jax.tree.map(lambda x: x[:2], a) if m else a for a, m in zip(example.args, example.mapped, strict=True))

    def mapped(function):
        return jax.vmap(scalar(function, example), axes)(*few)

    both(name, mapped)
    one_by_one = [scalar(example.function, example)(*row(example, i)) for i in range(2)]
    assert_close(mapped(example.function), jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), tolerance(name))


@pytest.mark.parametrize("name", EXAMPLES)
def test_checkpoint(name):
    """The simulator has effects, which `jax.checkpoint` refuses; the kernel's program is lowered instead."""
    example, args = EXAMPLES[name], row(EXAMPLES[name], 0)
    remat = jax.jit(scalar(jax.checkpoint(example.function), example))
    assert_close(remat(*args), scalar(example.function, example)(*args), tolerance(name))
    plain, again = (hopper.kernel_counts(hopper.lower(f, *args)) for f in (scalar(example.function, example), remat))
    assert plain and all(again[kernel] >= n for kernel, n in plain.items())


@pytest.fixture(scope="module")
def sharded():
    """What `shard` says of each operation, in a process with eight devices."""
    return on_eight_devices("from tests.pallas_kernels.test_transforms import main; main()")


@pytest.mark.slow
def test_shard_map_over_eight_devices(sharded):
    assert sharded.keys() == EXAMPLES.keys()
    assert all(counts and min(counts.values()) >= 1 for counts in sharded.values())


def main() -> None:
    """Prints the counts of `shard` for every operation."""
    print(json.dumps({name: shard(name) for name in EXAMPLES}))


def shard(name: str) -> dict[str, int]:
    """One element of the batch a device, with XLA and simulated; the kernels of the program for eight H100s."""
    example = EXAMPLES[name]
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    specs = tuple(PartitionSpec("d") if m else PartitionSpec() for m in example.mapped)

    def spread(function, mesh):
        def one(*args):
            args = [jax.tree.map(lambda x: x[0], a) if m else a for a, m in zip(args, example.mapped, strict=True)]
            # Gradients of what all devices share have been summed by autodiff.
            return jax.tree.map(
                lambda x: jax.lax.psum(x, "d") if varying_axes(x) else x, scalar(function, example)(*args)
            )

        return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))

    def summed(function):
        each = [scalar(function, example)(*row(example, i)) for i in range(DEVICES)]
        return jax.tree.map(lambda *x: jnp.sum(jnp.stack(x), axis=0), *each)

    if name not in WITH_BARRIERS:
        # With four devices or more the simulator takes copies of different devices for races.
        both(name, lambda function: spread(function, mesh)(*example.args), detect_races=False)
    assert_close(spread(example.function, mesh)(*example.args), summed(example.function), 5 * tolerance(name))
    target = hopper.abstract_mesh(DEVICES)
    with jax.sharding.use_abstract_mesh(target):
        lowered = spread(example.function, target).trace(*example.args).lower(lowering_platforms=("cuda",))
    return dict(hopper.kernel_counts(lowered))

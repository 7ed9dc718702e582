"""The target: simulator, lowering and compiler are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, rms_norm
from tests.pallas_kernels.test_contract import needs_compiler


def swap_halves(x, *, waits: bool):
    """Two warpgroups each write a half of shared memory and read the other's, with or without a barrier between."""

    def body(x_ref, out_ref, buffer, written):
        mine = lax.axis_index("wg")
        buffer[mine] = x_ref[mine]
        if waits:
            plgpu.barrier_arrive(written)
            plgpu.barrier_wait(written)
        out_ref[mine] = buffer[1 - mine]

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        num_threads=2,
        thread_name="wg",
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier(num_arrivals=2)],
        kernel_name="swap_halves",
    )(x)


X = jnp.arange(256, dtype=jnp.float32).reshape(2, 128)


def test_the_simulator_runs_kernels_and_finds_races():
    with hopper.simulated():
        out = swap_halves(X, waits=True)
    np.testing.assert_array_equal(out, X[::-1])
    with pytest.raises(hopper.RaceError), hopper.simulated():
        swap_halves(X, waits=False)
    with hopper.simulated():  # and works again after that
        swap_halves(X, waits=True)


def test_the_simulator_recovers_from_an_error():
    with pytest.raises(KeyError), hopper.simulated():
        raise KeyError
    assert not hopper.is_simulated()
    with hopper.simulated():  # without any kernel
        pass
    with hopper.simulated():
        assert hopper.is_simulated() and not hopper.why_not_hopper()
        swap_halves(X, waits=True)


def test_the_target_is_where_the_code_will_run():
    (reason,) = hopper.why_not_hopper()
    assert "'cpu'" in reason and "H100" in reason
    with jax.sharding.use_abstract_mesh(hopper.abstract_mesh()):
        assert hopper.device_kind() == hopper.DEVICE_KIND and not hopper.why_not_hopper()


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20"])
def test_hopper_gpus_are_known_by_name(kind, monkeypatch):
    monkeypatch.setattr(hopper, "device_kind", lambda: kind)
    assert not hopper.why_not_hopper()


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GeForce RTX 4090", "TPU v5", "cpu"])
def test_other_devices_are_not_hopper_gpus(kind, monkeypatch):
    monkeypatch.setattr(hopper, "device_kind", lambda: kind)
    assert repr(kind) in hopper.why_not_hopper()[0]


def test_kernels_are_counted_through_calls_and_loops():
    norm = jax.jit(lambda x: rms_norm(x, jnp.ones(256, x.dtype)))

    def thrice_and_in_a_loop(x):
        x = norm(norm(norm(x)))
        return lax.scan(lambda x, _: (norm(x) + rms_norm(x, jnp.zeros(256, x.dtype)), None), x, length=5)[0]

    lowered = hopper.lower(thrice_and_in_a_loop, jax.ShapeDtypeStruct((4, 256), jnp.bfloat16))
    assert hopper.kernel_counts(lowered) == {"rms_norm_forward": 5}


def test_without_the_compiler_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(hopper, "toolchain", lambda: ["Python package jax-cuda13-plugin is not installed"])
    with pytest.raises(NotImplementedError, match="jax-cuda13-plugin is not installed"):
        hopper.compile_for_h100(lambda x: x, jnp.zeros(3))


@needs_compiler
def test_compiles_for_several_devices_with_memory_and_cost():
    mesh = hopper.mesh(8)
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=sharded)
    compiled = hopper.compile_for_h100(lambda x: x @ x.T, x, devices=8)
    assert compiled.memory_analysis().argument_size_in_bytes == 4096 * 1024 * 2 / 8


@needs_compiler
def test_machine_code_reports_what_a_kernel_occupies():
    def copy(x):
        def body(x_ref, out_ref, buffer):
            buffer[...] = x_ref[...]
            out_ref[...] = buffer[...]

        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_types=[plgpu.SMEM(x.shape, x.dtype)],
            kernel_name="copy",
        )(x)

    (code,) = hopper.machine_code(copy, jax.ShapeDtypeStruct((8, 128), jnp.float32))
    assert code.kernel == "copy" and code.spill_bytes == 0
    assert 8 <= code.registers <= 255 and 4096 <= code.shared_bytes < 8192

import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hopper
from rapidfire_jax.errors import InputError
from rapidfire_jax.memory import devices
from rapidfire_jax.memory.devices import DEVICES, find_device, present_device


def fake(monkeypatch, kind, memory):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind, memory_stats=lambda: {"bytes_limit": memory})
    monkeypatch.setattr(jax, "local_devices", lambda *args, **kwargs: [device])


def test_a_name_finds_its_device_and_the_h100_is_that_of_the_kernels():
    for name in ("a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200", "l40s", "rtx4090"):
        assert find_device(name).name == name
    h100 = find_device("h100-80gb")
    assert (h100.kind, h100.cores, h100.bandwidth) == (hopper.DEVICE_KIND, hopper.CORES, hopper.BANDWIDTH)
    assert h100.bf16_rate == pytest.approx(hopper.BF16_RATE, rel=0.01)
    assert all(d.host_bandwidth < d.bandwidth and d.float32_rate < d.bf16_rate for d in DEVICES.values())


def test_an_unknown_name_is_told_the_nearest_and_all():
    with pytest.raises(InputError, match=r"'H100-80'.*did you mean 'h100-80gb'.*a100-40gb, .*, cpu"):
        find_device("H100-80")
    with pytest.raises(InputError, match="'zzz' is not known; known: a100-40gb"):
        find_device("zzz")


def test_roofline():
    h100 = find_device("h100-80gb")
    assert h100.seconds(990e12, 1.0, jnp.bfloat16) == pytest.approx(1.0)
    assert h100.seconds(495e12, 1.0, jnp.float32) == pytest.approx(1.0)
    assert h100.seconds(1.0, 3.35e12, jnp.bfloat16) == pytest.approx(1.0)


def test_the_cpu_is_measured_once():
    cpu = find_device("cpu")
    assert find_device("cpu") is cpu is present_device()
    assert 2**28 < cpu.memory < 2**44 and cpu.host_bandwidth is None
    assert 1e8 < cpu.bandwidth < 1e13 and 1e8 < cpu.float32_rate < 1e15


def test_a_container_with_less_memory_than_its_machine(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices, "Path", lambda path: limit if path.endswith("memory.max") else tmp_path / "none")
    limit.write_text("max\n")
    whole = devices._host_memory()
    limit.write_text(f"{whole // 2}\n")
    assert devices._host_memory() == whole // 2


def test_the_present_device_is_the_nearest_of_its_model(monkeypatch):
    fake(monkeypatch, "NVIDIA A100-PCIE-40GB", 42 * 10**9)
    found = present_device()
    assert (found.name, found.kind, found.memory) == ("a100-40gb", "NVIDIA A100-PCIE-40GB", 42 * 10**9)
    fake(monkeypatch, "NVIDIA GeForce RTX 4090", 25 * 10**9)
    assert present_device().name == "rtx4090"
    fake(monkeypatch, "Tesla V100", 16 * 10**9)
    with pytest.raises(InputError, match=r"Tesla V100.*h100-80gb"):
        present_device()

"""What programs take of memory, counted by hand, and that asking compiles nothing."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapidfire_jax import programs
from rapidfire_jax.programs import Need, Program, need_of, peak_bytes
from tests.helpers.compilations import compilations
from tests.helpers.devices import on_eight_devices

SIZE = 256  # a square matrix of float32 is 256 KiB
MATRIX = 4 * SIZE**2


def square(state, x):
    """One matrix in, donated and written over; a product that is neither argument nor result."""
    return state + jnp.tanh(x @ x) @ x, x.sum()


def matrix(seed):
    return jax.random.normal(jax.random.key(seed), (SIZE, SIZE))


@pytest.mark.parametrize("donate", [(), (0,)])
def test_need_by_hand(donate):
    state, x, beside = matrix(0), matrix(1), [matrix(2), matrix(3)]
    others = sum(a.nbytes for a in jax.live_arrays()) - 2 * MATRIX
    program = Program("square", square, donate)
    with compilations() as found:
        new, total = program(state, x)
    assert len(found) == 1 and state.is_deleted() == bool(donate)
    (need,) = program.needs
    assert (need.arguments, need.aliased) == (2 * MATRIX, MATRIX * len(donate))
    assert MATRIX + total.nbytes <= need.outputs <= MATRIX + total.nbytes + 64  # and the pointers of a tuple
    assert MATRIX <= need.temporaries <= 3 * MATRIX
    assert need.resident == others >= len(beside) * MATRIX
    assert need.peak == 2 * MATRIX + need.temporaries + need.outputs - need.aliased + others
    assert peak_bytes() >= need.peak

    with compilations() as found:
        program(new, x)
    assert not found and program.needs == [need]
    program(jnp.ones((8, 8)), jnp.ones((8, 8)))
    assert len(program.needs) == 2 and program.needs[1].arguments == 512


def test_statistics_of_the_device_come_first(monkeypatch):
    class Device:
        def __init__(self, statistics):
            self.memory_stats = lambda: statistics

    monkeypatch.setattr(programs, "_largest", 5)
    for statistics, expected in (({"peak_bytes_in_use": 7}, 7), ({}, 5), (None, 5)):
        monkeypatch.setattr(jax, "local_devices", lambda statistics=statistics: [Device(statistics)])
        assert peak_bytes() == expected


def test_a_device_holds_its_part_of_what_is_spread():
    found = on_eight_devices("from tests.test_programs import spread; spread()")
    assert found == {"arguments": MATRIX // 8, "outputs": MATRIX // 8, "resident": MATRIX // 8 + MATRIX}


def spread():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x, beside = (jax.device_put(np.ones((SIZE, SIZE), np.float32), over) for _ in range(2))
    here, there = (jax.device_put(np.ones((SIZE, SIZE), np.float32), jax.devices()[i]) for i in (0, 3))
    program = Program("double", lambda x: 2 * x)
    program(x)
    (need,) = program.needs
    print(json.dumps({name: getattr(need, name) for name in ("arguments", "outputs", "resident")}))
    del beside, here, there


def test_the_same_description_serves_a_device_that_is_not_there():
    from pallas_kernels import hopper

    if missing := hopper.toolchain():
        pytest.skip("; ".join(missing))
    program = Program("square", square, donate=(0,))
    x = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    need = need_of(hopper.compile_for_h100(program, x, x), resident=10)
    assert (need.arguments, need.aliased, need.resident) == (2 * MATRIX, MATRIX, 10)


def test_peak():
    assert Need(arguments=100, temporaries=20, outputs=70, aliased=60, resident=5).peak == 135


# Prints MB that malloc holds and could give back once a program is compiled: a loop's body of many operations.
COMPILING = """
import ctypes, jax, jax.numpy as jnp
from rapidfire_jax.programs import give_back_memory_of_compiling

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def many(x):
    for i in range(60):
        x = jnp.sort(jnp.sin(x @ x + i), axis=i % 2)
    return x

if GIVES_BACK:
    give_back_memory_of_compiling()
x = jnp.ones((64, 64))
jax.jit(many)(x).block_until_ready()
before = resident()
ctypes.CDLL(None).malloc_trim(0)
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_what_the_compiler_has_freed_goes_back():
    def held(gives_back):
        program = COMPILING.replace("GIVES_BACK", str(gives_back))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return float(done.stdout)

    kept, given_back = held(False), held(True)
    assert kept > 5 and given_back < kept / 2

"""On a machine with a Hopper GPU the tests run the kernels there, in memory full of NaN."""

import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.04")  # of the GPU's memory, for each of several workers

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import hopper

ON_HOPPER = not hopper.why_not_hopper()
if ON_HOPPER:
    jax.config.update("jax_default_matmul_precision", "highest")  # references in float32, not in TF32


@pytest.fixture(autouse=True)
def poison():
    """Arrays that are allocated next hold NaN, or -1, until something is written to them."""
    if ON_HOPPER:
        stats = jax.devices()[0].memory_stats()
        unused = (stats["bytes_limit"] - stats["bytes_in_use"]) >> 26 << 26
        jnp.full(unused // 8 * 7 // 4, -1, jnp.int32).block_until_ready()
    yield
    if ON_HOPPER:
        try:
            jnp.zeros(1).block_until_ready()
        except jax.errors.JaxRuntimeError as error:  # the process has lost the GPU; pytest-xdist starts another
            print(error, file=sys.__stderr__, flush=True)
            os._exit(1)

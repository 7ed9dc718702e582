"""rms_norm: the kernel simulated against the reference, the reference against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rms_norm
from tests.helpers.agreement import assert_agrees, normal
from tests.helpers.tolerances import F32

CASES = [
    *itertools.product((1, 7, 64), (128, 640, 1024), ("bfloat16",), (False, True), (0.0, 1.0)),
    *itertools.product((5,), (256, 4096), ("float32", "float16"), (True,), (0.0, 1.0)),
]


@pytest.mark.parametrize(("rows", "width", "dtype", "added", "offset"), CASES)
def test_kernel_agrees_with_the_reference(rows, width, dtype, added, offset):
    x, residual = normal(0, (rows, width), dtype), normal(1, (rows, width), dtype)
    scale = normal(2, (width,), dtype)

    def function(x, scale, *residual, implementation):
        return rms_norm(x, scale, *residual, offset=offset, implementation=implementation)

    args = (x, scale, residual) if added else (x, scale)
    assert_agrees("rms_norm", function, args, tuple(range(len(args))))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
def test_reference_agrees_with_numpy(scale):
    x, weight = normal(0, (3, 4, 48), scale=scale), normal(1, (48,))
    x64 = np.asarray(x, np.float64)
    wanted = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * (np.asarray(weight, np.float64) + 1)
    np.testing.assert_allclose(rms_norm(x, weight, offset=1.0), wanted, **F32)


def test_a_row_of_zeros_has_finite_results_and_gradients():
    out, pull = jax.vjp(lambda x: rms_norm(x, jnp.ones(256)), jnp.zeros((2, 256)))
    assert np.all(out == 0) and np.isfinite(pull(jnp.ones_like(out))[0]).all()


def test_says_what_is_wrong():
    x = jnp.zeros((2, 192), jnp.int8)
    with pytest.raises(NotImplementedError) as error:
        rms_norm(x, jnp.zeros(192, jnp.int8), implementation="mosaic_gpu")
    for reason in ("the device is 'cpu'", "dtype int8", "width 192"):
        assert reason in str(error.value)
    with pytest.raises(ValueError, match=r"accepted: 'mosaic_gpu', 'xla', None"):
        rms_norm(jnp.zeros((2, 8)), jnp.zeros(8), implementation="triton")
    with pytest.raises(ValueError, match=r"do not fit"):
        rms_norm(jnp.zeros((2, 8)), jnp.zeros(9))
    with pytest.raises(ValueError, match=r"is not like x"):
        rms_norm(jnp.zeros((2, 8)), jnp.zeros(8), jnp.zeros((2, 8), jnp.bfloat16))

"""quantized_matmul: the kernel simulated against the reference, that against NumPy, NF4 against bitsandbytes."""

import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.dtypes import float0

from pallas_kernels import Quantized, dequantize, hopper, quantize, quantized_matmul, tuning, unpack
from pallas_kernels.quantized_matmul import reference
from pallas_kernels.quantized_matmul.formats import DYNAMIC_MAP, FORMATS
from pallas_kernels.quantized_matmul.mosaic_gpu import Config
from tests.helpers.agreement import assert_agrees, assert_close, normal
from tests.helpers.cases import spread
from tests.helpers.tolerances import F32, KERNEL

GOLDEN = Path(__file__).parents[1] / "golden" / "nf4" / "nf4.npz"

SHAPES = [  # M, N, K
    (1, 64, 64),
    (5, 64, 320),
    (8, 128, 256),
    (9, 192, 128),
    (16, 64, 512),
    (33, 64, 192),
    (130, 64, 64),
    (260, 64, 128),
]
CASES = [
    *itertools.product(SHAPES, FORMATS, ["bfloat16"]),
    *itertools.product([(7, 64, 128), (24, 64, 320)], FORMATS, ["float16"]),
]


@pytest.mark.parametrize(("shape", "format", "dtype"), spread(CASES, 10))
def test_kernel_agrees_with_the_reference(shape, format, dtype):
    m, n, k = shape
    x, w = normal(0, (m, k), dtype), quantize(normal(1, (n, k)), format)
    assert_agrees("quantized_matmul", quantized_matmul, (x, w), (0,))


@pytest.mark.parametrize("format", ["int8", "nf4"])
@pytest.mark.parametrize(
    "config",
    spread(
        [
            Config(tile_m=8, warpgroups=1, slices=1, groups=1, stages=2, splits=4),
            Config(tile_m=8, warpgroups=2, slices=1, groups=2, stages=2, splits=2),
            Config(tile_m=8, warpgroups=1, slices=4, groups=2, stages=2, splits=1),
            Config(tile_m=16, warpgroups=4, slices=1, groups=4, stages=3, splits=1),
            Config(tile_m=16, warpgroups=2, slices=2, groups=1, stages=2, splits=2),
            Config(tile_m=128, warpgroups=2, slices=1, groups=1, stages=3, splits=1),
        ],
        2,
    ),
)
def test_kernel_agrees_with_the_reference_however_the_work_is_cut(format, config):
    x, w = normal(0, (20, 512), jnp.bfloat16), quantize(normal(1, (256, 512)), format)
    with tuning.trial(quantized_matmul_forward=config):
        assert_agrees("quantized_matmul", quantized_matmul, (x, w))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [1e-7, 1e3])
def test_kernel_keeps_tiny_and_large_weights_in_float16(format, scale):
    w = quantize(normal(1, (64, 128), scale=scale), format)
    x = normal(0, (8, 128), jnp.float16, scale=min(1e-3 / scale, 1.0))
    with hopper.simulated():
        found = quantized_matmul(x / jnp.float16(16), w, implementation="mosaic_gpu")
    wanted = (x / jnp.float16(16)).astype(jnp.float32) @ dequantize(w).T
    spacing = 2**-24 / float(jnp.abs(wanted).max())  # of the smallest float16 results
    assert_close(found, wanted, KERNEL["quantized_matmul"]["float16"] + spacing)


def test_kernel_multiplies_zeros_and_takes_leading_axes():
    w = quantize(normal(1, (64, 128)).at[3].set(0).at[7, :64].set(0), "nf4")
    x = normal(0, (2, 3, 128), jnp.bfloat16)
    with hopper.simulated():
        y = quantized_matmul(x, w, implementation="mosaic_gpu")
        none = quantized_matmul(x, quantize(jnp.zeros((64, 128)), "int4"), implementation="mosaic_gpu")
    assert y.shape == (2, 3, 64)
    assert np.all(none == 0)
    assert_close(y, jnp.einsum("abk,nk->abn", x.astype(jnp.float32), dequantize(w)), 6e-3)


def oracle(q: Quantized) -> np.ndarray:
    """Dequantised in float64, one group at a time, from codes one a byte."""
    codes = np.asarray(unpack(q))
    n, k = codes.shape
    if q.format == "int8":
        return (codes.astype(np.float64) - 128) * np.asarray(q.scale, np.float64)[:, None]
    values = np.arange(-8, 8) if q.format == "int4" else np.load(GOLDEN)["codebook"]
    out, groups = np.empty((n, k)), k // 64
    blocks = np.asarray(q.block_scale, np.float64)
    for row, group in itertools.product(range(n), range(groups)):
        block = blocks[group * blocks.shape[0] // groups, row]
        scale = np.float64(DYNAMIC_MAP[q.scale[group, row]]) * block + float(q.offset)
        columns = slice(64 * group, 64 * (group + 1))
        out[row, columns] = values[codes[row, columns]] * scale
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_reference_agrees_with_numpy(format, scale):
    w = quantize(normal(0, (48, 320), scale=scale), format)
    x, dy = normal(1, (3, 4, 320)), normal(2, (3, 4, 48))
    wide = oracle(w)
    y, pull = jax.vjp(lambda x: quantized_matmul(x, w), x)
    assert_close(y, np.asarray(x, np.float64) @ wide.T, 1e-6)
    assert_close(pull(dy)[0], np.asarray(dy, np.float64) @ wide, 1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_float32_needs_only_a_part_of_the_matrix_at_a_time(format, monkeypatch):
    w, x = quantize(normal(0, (96, 128)), format), normal(1, (5, 128))
    whole, pull = jax.vjp(lambda x: quantized_matmul(x, w), x)
    monkeypatch.setattr(reference, "PART", 40 * 128)
    parts, pull_parts = jax.vjp(lambda x: quantized_matmul(x, w), x)
    np.testing.assert_allclose(parts, whole, **F32)
    np.testing.assert_allclose(pull_parts(whole)[0], pull(whole)[0], **F32)


def test_nf4_equals_bitsandbytes():
    golden = np.load(GOLDEN)
    q = jax.jit(partial(quantize, format="nf4"))(golden["weights"].astype(np.float32))
    np.testing.assert_array_equal(unpack(q), golden["codes"])
    np.testing.assert_array_equal(q.scale.T, golden["scale_codes"])
    # The mean of the scales is a sum in another order; a scale far below it loses digits to that.
    np.testing.assert_allclose(dequantize(q), golden["dequantized"], rtol=1e-6, atol=1e-6 * float(q.offset))
    assert golden["scale_codes"].min() == 0  # a block whose largest centred scale is negative


@pytest.mark.parametrize(("format", "bits", "error"), [("int8", 8.01, 0.01), ("int4", 4.15, 0.12), ("nf4", 4.15, 0.10)])
def test_size_and_error(format, bits, error):
    w = normal(0, (128, 4096))
    q = quantize(w, format)
    assert q.nbytes * 8 / w.size < bits
    assert np.sqrt(np.mean((dequantize(q) - w) ** 2)) < error
    again = quantize(dequantize(q), format)
    assert np.mean(unpack(again) != unpack(q)) < 1e-3


@pytest.mark.parametrize("format", FORMATS)
def test_stacks_of_matrices(format):
    w = normal(0, (2, 3, 64, 128))
    stack = jax.jit(partial(quantize, format=format))(w)
    assert stack.shape == w.shape
    one = quantize(w[1, 2], format)
    assert np.mean(unpack(stack)[1, 2] != unpack(one)) < 1e-3  # fused division rounds otherwise
    np.testing.assert_allclose(dequantize(stack)[1, 2], dequantize(one), rtol=0, atol=0.02)
    x = normal(1, (5, 128))
    layers = jax.tree.map(lambda leaf: leaf[0], stack)
    _, found = jax.lax.scan(lambda carry, layer: (carry, quantized_matmul(x, layer)), 0, layers)
    np.testing.assert_allclose(found, jnp.einsum("mk,lnk->lmn", x, dequantize(layers)), **F32)


def test_gradient_flows_to_x_alone():
    w, x = quantize(normal(0, (64, 128)), "nf4"), normal(1, (3, 128))

    @jax.checkpoint
    def loss(x, w):
        return jnp.sum(quantized_matmul(x, w) ** 2)

    dx, dw = jax.vjp(loss, x, w)[1](jnp.float32(1))
    wide = dequantize(w)
    np.testing.assert_allclose(dx, 2 * (x @ wide.T) @ wide, **F32)
    assert dw.codes.dtype == dw.scale.dtype == float0
    assert not np.any(dw.block_scale) and not np.any(dw.offset)


def test_vmap():
    w, x = quantize(normal(0, (64, 128)), "int4"), normal(1, (3, 4, 128))
    np.testing.assert_allclose(jax.vmap(lambda x: quantized_matmul(x, w))(x), quantized_matmul(x, w), **F32)


def test_says_what_is_wrong():
    w = quantize(normal(0, (72, 128)), "nf4")
    with pytest.raises(NotImplementedError) as error:
        quantized_matmul(jnp.zeros((2, 128)), w, implementation="mosaic_gpu")
    for reason in ("the device is 'cpu'", "dtype float32", "72 outputs"):
        assert reason in str(error.value)
    with pytest.raises(NotImplementedError, match=r"72 inputs; accepted: multiples of 64"):
        quantized_matmul(jnp.zeros((2, 72)), quantize(jnp.ones((64, 72)), "int8"), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"accepted: 'mosaic_gpu', 'xla', None"):
        quantized_matmul(jnp.zeros((2, 128)), w, implementation="triton")
    with pytest.raises(ValueError, match=r"do not fit \[\*M, K\], \[N, K\]"):
        quantized_matmul(jnp.zeros((2, 64)), w)
    with pytest.raises(ValueError, match=r"is not one matrix"):
        quantized_matmul(jnp.zeros((2, 128)), quantize(jnp.zeros((2, 64, 128)), "int8"))
    with pytest.raises(ValueError, match=r"accepted: 'int8', 'int4', 'nf4'"):
        quantize(jnp.zeros((64, 64)), "fp4")
    with pytest.raises(ValueError, match=r"K a multiple of 64"):
        quantize(jnp.zeros((64, 72)), "nf4")

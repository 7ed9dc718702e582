"""decode_attention: the kernel simulated against the reference, the reference against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, hopper, quantize_cache
from tests.helpers.agreement import assert_agrees, assert_close, normal
from tests.helpers.tolerances import KERNEL

# rows, slots, query heads, key/value heads, width
SHAPES = [
    (2, 72, 2, 2, 64),
    (2, 200, 8, 2, 64),
    (1, 136, 8, 1, 128),
    (1, 88, 2, 2, 256),
]
OPTIONS = [{}, {"soft_cap": 2.0, "scale": 0.3}]
CASES = [
    *itertools.product(SHAPES, ("bfloat16",), (False, True), OPTIONS),
    *itertools.product(SHAPES[1:], ("float16",), (False, True), OPTIONS[1:]),
    ((1, 64, 12, 1, 64), "bfloat16", False, {}),
    ((1, 16, 72, 1, 64), "bfloat16", False, {}),
    ((3, 264, 4, 4, 64), "bfloat16", False, {}),
    ((1, 40, 20, 10, 64), "bfloat16", True, {}),
]


def operands(shape, dtype, quantised, seed=0, scale=1.0):
    """Queries, cache, and the cache's scales or nothing."""
    B, C, N, K, H = shape
    q = normal(seed, (B, N, H), dtype)
    keys, values = (normal(seed + i, (B, K, C, H), scale=scale) for i in (1, 2))
    if not quantised:
        return (q, keys.astype(dtype), values.astype(dtype)), ()
    (keys, key_scales), (values, value_scales) = quantize_cache(keys), quantize_cache(values)
    return (q, keys, values), (key_scales, value_scales)


def call(q, keys, values, starts, ends, *scales, implementation=None, **options):
    named = dict(zip(("key_scales", "value_scales"), scales, strict=False))
    return decode_attention(q, keys, values, ends, starts=starts, implementation=implementation, **named, **options)


@pytest.mark.parametrize(("shape", "dtype", "quantised", "options"), CASES)
def test_kernel_agrees_with_the_reference(shape, dtype, quantised, options):
    cache, scales = operands(shape, dtype, quantised)
    rows = jnp.arange(shape[0])
    starts, ends = 5 * rows, shape[1] - 3 * rows

    def function(*args, implementation):
        return call(*args, implementation=implementation, **options)

    assert_agrees("decode_attention", function, (*cache, starts, ends, *scales))


@pytest.mark.parametrize("quantised", [False, True])
def test_kernel_skips_what_no_row_sees(quantised):
    """Empty ranges, single slots, ranges beyond the cache, and tiles of NaN that must not be read."""
    (q, keys, values), scales = operands((6, 200, 2, 1, 64), "bfloat16", quantised)
    starts = jnp.array([0, 70, 199, -50, 130, 0])
    ends = jnp.array([0, 70, 200, 1000, 64, 1])
    if not quantised:
        keys, values = (x.at[5, :, 128:].set(jnp.nan) for x in (keys, values))
    with hopper.simulated():
        found = call(q, keys, values, starts, ends, *scales, implementation="mosaic_gpu")
    keys, values = (jnp.nan_to_num(x) if not quantised else x for x in (keys, values))
    wanted = call(q, keys, values, starts, ends, *scales, implementation="xla")
    assert_close(found, wanted, KERNEL["decode_attention"]["bfloat16"])
    assert np.all(np.asarray(found[jnp.array([0, 1, 4])], np.float32) == 0)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_kernel_survives_huge_and_tiny_scores(scale):
    (q, keys, values), _ = operands((1, 72, 2, 1, 64), "bfloat16", False, scale=scale)
    assert_agrees("decode_attention", call, (q, keys, values, jnp.array([0]), jnp.array([72])))


def test_kernel_under_vmap_and_checkpoint():
    (q, keys, values), _ = operands((2, 72, 2, 1, 64), "bfloat16", False)
    starts, ends = jnp.array([0, 3]), jnp.array([72, 40])

    def stacked(implementation):
        def one(*args):
            return jax.checkpoint(lambda *a: call(*(x[None] for x in a), implementation=implementation)[0])(*args)

        return jax.vmap(one)(q, keys, values, starts, ends)

    with hopper.simulated():
        found = stacked("mosaic_gpu")
    assert_close(found, stacked("xla"), KERNEL["decode_attention"]["bfloat16"])


def test_no_gradient_flows_whichever_implementation_runs():
    (q, keys, values), _ = operands((1, 72, 2, 1, 64), "bfloat16", False)

    def total(q, implementation):
        return call(q, keys, values, jnp.array([0]), jnp.array([9]), implementation=implementation).sum()

    with hopper.simulated():
        assert np.all(np.asarray(jax.grad(total)(q, "mosaic_gpu"), np.float32) == 0)
    assert np.all(np.asarray(jax.grad(total)(q, "xla"), np.float32) == 0)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(("dtype", "heads"), [("float32", 2), ("bfloat16", 2), ("bfloat16", 6)])
def test_reference_agrees_with_numpy(dtype, heads, quantised, soft_cap):
    B, _, N, K, H = shape = (3, 17, 6, heads, 8)
    (q, keys, values), scales = operands(shape, dtype, quantised)
    starts, ends = np.array([0, 4, 17]), np.array([17, 5, 17])
    found = call(q, keys, values, jnp.asarray(starts), jnp.asarray(ends), *scales, soft_cap=soft_cap, scale=0.7)
    q, keys, values, *scales = (np.asarray(x, np.float64) for x in (q, keys, values, *scales))
    if quantised:
        keys, values = keys * scales[0][..., None], values * scales[1][..., None]
    wanted = np.zeros((B, N, H))
    for b, n in itertools.product(range(B), range(N)):
        seen = slice(starts[b], ends[b])
        if starts[b] < ends[b]:
            scores = keys[b, n // (N // K), seen] @ q[b, n] * 0.7
            scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
            weights = np.exp(scores - scores.max())
            wanted[b, n] = weights / weights.sum() @ values[b, n // (N // K), seen]
    assert_close(found, wanted, 1e-6 if dtype == "float32" else KERNEL["decode_attention"][dtype])


def test_quantised_numbers_are_off_by_at_most_half_a_scale():
    x = normal(0, (4, 5, 32)) * jnp.array([1e-20, 1.0, 1e20, 0.0])[:, None, None]
    codes, scales = quantize_cache(x)
    assert (codes.dtype, scales.dtype, codes.shape, scales.shape) == (jnp.int8, jnp.float32, x.shape, x.shape[:-1])
    assert np.all(np.abs(np.asarray(codes[:3], np.int32)).max(axis=-1) == 127) and np.all(codes[3] == 0)
    off = np.abs(np.asarray(codes, np.float64) * np.asarray(scales, np.float64)[..., None] - np.asarray(x, np.float64))
    assert np.all(off <= 0.5000001 * np.asarray(scales, np.float64)[..., None])
    codes, _ = quantize_cache(jnp.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]))
    np.testing.assert_array_equal(codes, [127, 0, 2, 2, 0, -2])


def test_says_what_is_wrong():
    q, cache, ends = jnp.zeros((2, 4, 48)), jnp.zeros((2, 2, 9, 48)), jnp.zeros(2, jnp.int32)
    with pytest.raises(NotImplementedError) as error:
        decode_attention(q, cache, cache, ends, implementation="mosaic_gpu")
    for reason in ("the device is 'cpu'", "dtype float32", "head width 48", "9 cache slots"):
        assert reason in str(error.value)
    codes, scales = jnp.zeros((2, 2, 9, 48), jnp.int8), jnp.zeros((2, 2, 9))
    for message, args, options in (
        (r"do not fit \[B, N, H\]", (q[0], cache, cache, ends), {}),
        (r"N a multiple of K", (q[:, :3], cache, cache, ends), {}),
        (r"ends float32\(2,\) is not an integer", (q, cache, cache, jnp.zeros(2)), {}),
        (r"starts int32\(3,\)", (q, cache, cache, ends), {"starts": jnp.zeros(3, jnp.int32)}),
        (r"both float32 as q, or both int8", (q, cache, codes, ends), {}),
        (r"key_scales=None with a cache of int8; accepted: float32\(2, 2, 9\)", (q, codes, codes, ends), {}),
        (r"value_scales=float32\(2, 2, 9\) with a cache", (q, cache, cache, ends), {"value_scales": scales}),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*args, **options)

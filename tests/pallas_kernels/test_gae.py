"""gae: the kernel simulated against the loop over time, and all implementations against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import gae, hopper, tuning
from pallas_kernels.gae.mosaic_gpu import Config
from tests.helpers.agreement import assert_agrees, normal
from tests.helpers.tolerances import F32, KERNEL

XLA = ("scan", "associative_scan")


def arguments(rows, length, dtype=jnp.float32, kept=0.7, seed=0):
    mask = jax.random.bernoulli(jax.random.key(seed + 2), kept, (rows, length))
    r, v, next_v = (normal(seed + i, shape, dtype) for i, shape in enumerate([(rows, length)] * 2 + [(rows,)]))
    return r, v, mask, jnp.asarray(0.97, dtype), jnp.asarray(0.9, dtype), next_v


def oracle(r, v, mask, gamma, lam, next_v):
    """Row by row, backwards over the positions of the mask; float64."""
    r, v, next_v = (np.asarray(x, np.float64) for x in (r, v, next_v))
    gamma, lam = float(gamma), float(lam)
    adv, returns = np.zeros(r.shape), np.zeros(r.shape)
    for b in range(len(r)):
        so_far, after = 0.0, next_v[b]
        for t in np.flatnonzero(mask[b])[::-1]:
            so_far = r[b, t] + gamma * after - v[b, t] + gamma * lam * so_far
            adv[b, t], returns[b, t], after = so_far, so_far + v[b, t], v[b, t]
    return adv, returns


def named(*args, implementation):
    return gae(*args, implementation="scan" if implementation == "xla" else implementation)


# Shapes around 1 row, 128 lanes and 32 positions; with all, some and no positions in the mask.
CASES = [
    *((rows, length, 0.7) for rows in (1, 2, 128, 130) for length in (1, 5, 32, 50)),
    *((3, length, kept) for length in (4, 33, 64, 100) for kept in (0.0, 0.1, 1.0)),
]


@pytest.mark.parametrize(("rows", "length", "kept"), CASES)
def test_kernel_agrees_with_the_loop(rows, length, kept):
    assert_agrees("gae", named, arguments(rows, length, kept=kept))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_gradients_of_the_kernel_are_those_of_the_loop(dtype):
    r, *args = arguments(2, 6)
    assert_agrees("gae", lambda *a, implementation: named(a[-1], *a[:-1], implementation=implementation),
                  (*args, (3 * r).astype(dtype)), (0, 2, 3, 4))  # fmt: skip


@pytest.mark.parametrize("steps", [4, 8, 16])
def test_kernel_without_next_value_and_with_every_number_of_steps(steps):
    r, v, mask, *_ = arguments(5, 21)

    def function(r, v, mask, implementation):
        return named(r, v, mask, 1.0, 0.95, implementation=implementation)

    with tuning.trial(gae_forward=Config(steps)):
        assert_agrees("gae", function, (r, v, mask))


@pytest.mark.parametrize("implementation", [*XLA, "mosaic_gpu"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_masked_positions_have_no_effect(poison, implementation):
    r, v, mask, *rest = arguments(4, 9)
    dirty = [jnp.where(mask, x, poison) for x in (r, v)]
    if implementation == "mosaic_gpu":
        with hopper.simulated():
            found = gae(*dirty, mask, *rest, implementation=implementation)
    else:
        found = gae(*dirty, mask, *rest, implementation=implementation)
    for got, want in zip(found, oracle(r, v, mask, *rest), strict=True):
        np.testing.assert_allclose(got, want, **F32)


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
@pytest.mark.parametrize("kept", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 13, 200])
def test_agrees_with_numpy(implementation, scale, kept, length):
    r, v, mask, gamma, lam, next_v = arguments(5, length, kept=kept)
    args = (scale * r, scale * v, mask, gamma, lam, scale * next_v)
    for got, want in zip(gae(*args, implementation=implementation), oracle(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("implementation", XLA)
def test_computes_in_float64_where_an_argument_has_it(implementation):
    with jax.enable_x64(True):
        args = arguments(3, 40, jnp.float64)
        for got, want in zip(gae(*args, implementation=implementation), oracle(*args), strict=True):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_the_default_on_a_cpu_is_the_loop():
    args = arguments(3, 8)
    for got, want in zip(gae(*args), gae(*args, implementation="scan"), strict=True):
        np.testing.assert_array_equal(got, want)
    assert "scan" in str(jax.make_jaxpr(gae)(*args))


@pytest.mark.parametrize("implementation", XLA)
def test_gradients_agree_with_differences(implementation):
    r, v, mask, *rest = arguments(2, 6)

    def loss(*args):
        return sum(jnp.sum(jnp.sin(x)) for x in gae(*args[:2], mask, *args[2:], implementation=implementation))

    check_grads(loss, (r, v, *rest), order=1, modes=("rev",), rtol=2e-2, atol=2e-2)


def test_vmap_over_discounts():
    r, v, mask, gamma, _, next_v = arguments(3, 7)
    lams = jnp.array([0.0, 0.5, 1.0])
    mapped = jax.vmap(lambda lam: gae(r, v, mask, gamma, lam, next_v))(lams)
    with hopper.simulated():
        kernel = jax.vmap(lambda lam: gae(r, v, mask, gamma, lam, next_v, implementation="mosaic_gpu"))(lams)
    for i, lam in enumerate(lams):
        for got, simulated, want in zip(mapped, kernel, oracle(r, v, mask, gamma, lam, next_v), strict=True):
            np.testing.assert_allclose(got[i], want, **F32)
            np.testing.assert_allclose(simulated[i], got[i], rtol=0, atol=10 * KERNEL["gae"]["float32"])


def test_checkpoint():
    args = arguments(2, 5)
    for got, want in zip(jax.checkpoint(gae)(*args), gae(*args), strict=True):
        np.testing.assert_allclose(got, want, **F32)


def test_says_what_is_wrong():
    r, v, mask, *rest = arguments(2, 5)
    with pytest.raises(ValueError, match=r"r_t \(2, 5\), v_t \(2, 4\) and mask_t \(2, 5\) do not fit"):
        gae(r, v[:, 1:], mask, *rest)
    with pytest.raises(ValueError, match=r"mask_t is float32; accepted: bool"):
        gae(r, v, mask.astype(jnp.float32), *rest)
    with pytest.raises(ValueError, match=r"next_v \(3,\) does not fit r_t \(2, 5\)"):
        gae(r, v, mask, 1.0, 1.0, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"accepted: 'mosaic_gpu', 'scan', 'associative_scan', None"):
        gae(r, v, mask, *rest, implementation="xla")
    with jax.enable_x64(True), pytest.raises(NotImplementedError) as error:
        gae(r.astype(jnp.float64), v, mask, 1.0, 1.0, implementation="mosaic_gpu")
    for reason in ("the device is 'cpu'", "dtype float64; accepted: float32"):
        assert reason in str(error.value)

"""ppo_loss: the kernel simulated against the reference, the reference against NumPy."""

import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, ppo_loss
from pallas_kernels.ppo_loss.reference import KLEstimator
from tests.helpers.agreement import assert_agrees, device_of, normal
from tests.helpers.tolerances import F32

ESTIMATORS = get_args(KLEstimator.__value__)
NUMBERS = {"clip_low": 0.2, "clip_high": 0.28, "value_coef": 0.1, "entropy_coef": 0.01, "kl_coef": 0.05}
CASES = [
    *[((3, 41), e, "critic", 0.2, None, False) for e in ESTIMATORS],
    *itertools.product([(1, 1), (4, 128), (5, 257)], ["k1", None], ["critic", None], [0.2], [None], [False]),
    *itertools.product([(130,)], ["k1", None], ["critic", None], [0.2], [1.5], [False, True]),
    *itertools.product([(2, 300)], ["k3", None], ["critic"], [None], [None, 1.5], [True]),
    ((7, 300), "k2", None, None, 1.5, True),
]


def arrays(shape, *, reference=True, critic=True, importance=False, scale=1.0):
    """What is trained first; ratios and values on all sides of their clips."""
    old = -jnp.abs(normal(0, shape))
    found = {
        "logp_t": old + normal(1, shape, scale=0.3 * scale),
        "entropy_t": jnp.abs(normal(2, shape)),
        "v_t": normal(3, shape, scale=scale) if critic else None,
        "mask_t": jax.random.bernoulli(jax.random.key(4), 0.7, shape),
        "old_logp_t": old,
        "adv_t": normal(5, shape),
    }
    if critic:
        found |= {"old_v_t": found["v_t"] + normal(6, shape, scale=0.3 * scale), "return_t": normal(7, shape)}
    if reference:
        found["ref_logp_t"] = found["logp_t"] + normal(8, shape, scale=0.5 * scale)
    if importance:
        found["importance_t"] = jnp.abs(normal(9, shape))
    return found


def total(x, implementation="xla", **options):
    trained = [x[name] for name in ("logp_t", "entropy_t", "v_t")]
    rest = {name: a for name, a in x.items() if name not in ("logp_t", "entropy_t", "v_t")}
    return ppo_loss(*trained, **rest, **NUMBERS | options, implementation=implementation)


def gradients(x, **options):
    return jax.grad(lambda t: total(x | t, **options).total)({k: x[k] for k in ("logp_t", "entropy_t", "v_t")})


@pytest.mark.parametrize(("shape", "estimator", "critic", "value_clip", "dual_clip", "importance"), CASES)
def test_kernel_agrees_with_the_reference(shape, estimator, critic, value_clip, dual_clip, importance):
    x = arrays(shape, reference=estimator is not None, critic=critic is not None, importance=importance)
    options = {"value_clip": value_clip, "dual_clip": dual_clip, "kl_estimator": estimator or "k1"}
    names = [name for name in x if x[name] is not None]

    def function(*args, implementation):
        return total({"v_t": None} | dict(zip(names, args, strict=True)), implementation, **options)

    differentiable = tuple(i for i, name in enumerate(names) if name in ("logp_t", "entropy_t", "v_t"))
    assert_agrees("ppo_loss", function, tuple(x[name] for name in names), differentiable)


@pytest.mark.parametrize("estimator", ["k3", "abs"])
def test_kernel_cuts_off_ratios_beyond_20_nats_like_the_reference(estimator):
    x = arrays((3, 100), scale=60.0)
    with hopper.simulated():
        found = (
            total(x, "mosaic_gpu", kl_estimator=estimator),
            gradients(x, implementation="mosaic_gpu", kl_estimator=estimator),
        )
    wanted = total(x, kl_estimator=estimator), gradients(x, kl_estimator=estimator)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max()), found, wanted)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reference_agrees_with_numpy(estimator):
    x = {k: np.asarray(v, np.float64 if k != "mask_t" else bool) for k, v in arrays((4, 33), importance=True).items()}
    mask = x["mask_t"]
    ratio = np.exp(x["logp_t"] - x["old_logp_t"])
    policy = np.maximum(-x["adv_t"] * ratio, -x["adv_t"] * np.clip(ratio, 0.8, 1.28))
    policy = np.where(x["adv_t"] < 0, np.minimum(policy, -x["adv_t"] * 1.4), policy) * x["importance_t"]
    clipped_v = np.clip(x["v_t"], x["old_v_t"] - 0.2, x["old_v_t"] + 0.2)
    value = 0.5 * np.maximum((x["v_t"] - x["return_t"]) ** 2, (clipped_v - x["return_t"]) ** 2)
    d = x["logp_t"] - x["ref_logp_t"]
    kl = {"k1": d, "k2": d**2 / 2, "k3": np.expm1(-d) + d, "abs": np.abs(d)}[estimator.removesuffix("+")]
    found = total(jax.tree.map(jnp.asarray, x), value_clip=0.2, dual_clip=1.4, kl_estimator=estimator)
    wanted = {
        "total": (policy + 0.1 * value - 0.01 * x["entropy_t"] + 0.05 * kl)[mask].sum(),
        "count": mask.sum(),
        "policy": policy[mask].sum(),
        "value": value[mask].sum(),
        "entropy": x["entropy_t"][mask].sum(),
        "kl": kl[mask].sum(),
        "approx_kl": (ratio - 1 - np.log(ratio))[mask].sum(),
        "clipped": ((ratio < 0.8) | (ratio > 1.28))[mask].sum(),
        "log_ratio": np.abs(np.log(ratio))[mask].sum(),
        "ratio_deviation": np.abs(ratio - 1)[mask].max(),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(found, name), value, **F32, err_msg=name)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_what_stands_outside_the_mask_has_no_effect_and_no_gradient(implementation):
    x = arrays((3, 50), importance=True)
    broken = {k: v if k == "mask_t" else jnp.where(x["mask_t"], v, jnp.nan) for k, v in x.items()}
    options = {"value_clip": 0.2, "dual_clip": 2.0, "kl_estimator": "k3", "implementation": implementation}
    with device_of(implementation):
        found, wanted = (total(a, **options) for a in (broken, x))
        slopes = gradients(broken, **options)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    for slope in slopes.values():
        assert np.all(np.asarray(slope)[~np.asarray(x["mask_t"])] == 0) and np.isfinite(slope).all()


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_a_token_that_is_not_a_number_makes_the_loss_one_too(implementation):
    x = arrays((2, 9)) | {"mask_t": jnp.ones((2, 9), bool)}
    for name in ("logp_t", "adv_t", "v_t", "return_t"):
        with device_of(implementation):
            broken = x | {name: x[name].at[0, 3].set(jnp.nan)}
            assert np.isnan(total(broken, implementation, value_clip=0.2).total), name


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_an_empty_mask_gives_zeros(implementation):
    x = arrays((2, 20)) | {"mask_t": jnp.zeros((2, 20), bool)}
    with device_of(implementation):
        found = total(x, implementation), gradients(x, implementation=implementation)
    assert all(np.all(np.asarray(a) == 0) for a in jax.tree.leaves(found))


def test_numbers_may_be_traced_and_swept():
    x = arrays((2, 30))
    sweep = jnp.array([0.1, 0.2, 0.3])
    with hopper.simulated():
        found = jax.jit(jax.vmap(lambda c: total(x, "mosaic_gpu", clip_low=c, kl_coef=c).total))(sweep)
    wanted = [total(x, clip_low=c, kl_coef=c).total for c in sweep]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_checkpoint_keeps_or_repeats_the_kernel():
    x = arrays((2, 30))

    def loss(logp):
        return total(x | {"logp_t": logp}, "mosaic_gpu").total

    counts = [hopper.kernel_counts(hopper.lower(jax.grad(f), x["logp_t"])) for f in (loss, jax.checkpoint(loss))]
    assert [c["ppo_loss_forward"] for c in counts] == [1, 1]


def test_double_precision_goes_to_the_reference():
    with jax.enable_x64(True):
        x = {k: v if k == "mask_t" else v.astype(jnp.float64) for k, v in arrays((2, 5)).items()}
        assert total(x, None).total.dtype == jnp.float64
        with pytest.raises(NotImplementedError, match="dtype float64; accepted: float32"):
            total(x, "mosaic_gpu")


def test_says_what_is_wrong():
    x = arrays((2, 0)) | {"adv_t": jnp.zeros((2, 0), jnp.bfloat16)}
    with pytest.raises(NotImplementedError) as error:
        total(x, "mosaic_gpu")
    for reason in ("the device is 'cpu'", "dtype bfloat16", "there are no tokens"):
        assert reason in str(error.value)
    x = arrays((2, 8))
    with pytest.raises(ValueError, match=r"accepted: 'mosaic_gpu', 'xla', None"):
        total(x, "triton")
    with pytest.raises(ValueError, match=r"adv \(2, 7\) is not like logp \(2, 8\)"):
        total(x | {"adv_t": jnp.zeros((2, 7))})
    with pytest.raises(ValueError, match=r"mask int32 is not bool"):
        total(x | {"mask_t": jnp.ones((2, 8), jnp.int32)})
    with pytest.raises(ValueError, match=r"belong together"):
        total(x | {"old_v_t": None})
    with pytest.raises(ValueError, match=r"kl_estimator='k4'; accepted: k1, k2, k3"):
        total(x, kl_estimator="k4")

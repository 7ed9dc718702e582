"""linear_logprob: the kernels simulated against the reference, both plain forms against NumPy in float64."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, linear_logprob, tuning
from pallas_kernels.linear_logprob.mosaic_gpu import Config, heuristic
from tests.helpers.agreement import assert_agrees, normal
from tests.helpers.cases import spread
from tests.helpers.tolerances import F32

SINGLE, PAIR, SPLIT = Config(64, 2, 1, 1), Config(64, 2, 2, 1), Config(64, 3, 1, 2)  # columns, stages, group, splits

CASES: list[tuple[int, int, int, str, dict[str, Any], Config]] = [
    # Rows and vocabularies around the edges of tiles, one or several stages deep.
    *itertools.product((1, 65), (64, 128), (64, 130), ("bfloat16",), ({},), (SINGLE,)),
    *itertools.product((7,), (64, 192), (1, 9, 67), ("bfloat16",), ({"temperature": 0.7},), (SPLIT,)),
    *itertools.product((129, 200), (64,), (100,), ("bfloat16", "float16"), ({"soft_cap": 3.0},), (PAIR,)),
    # Options, one by one and together.
    (20, 64, 96, "float16", {}, SINGLE),
    (20, 64, 96, "float16", {"temperature": 2.5, "soft_cap": 2.0}, SPLIT),
    (20, 64, 200, "bfloat16", {"chunk": 64}, SINGLE),  # slices of one tile; the last moves back
    (20, 64, 200, "bfloat16", {"chunk": 101, "soft_cap": 4.0}, SPLIT),  # padded to 128
    (20, 64, 200, "bfloat16", {"chunk": 500}, SINGLE),
    # Several groups of blocks, the last of which has a block without rows.
    (300, 64, 70, "bfloat16", {}, Config(64, 2, 2, 1)),
    (300, 64, 130, "bfloat16", {"temperature": 0.5}, Config(64, 2, 2, 2)),
    # More stages than steps, wide tiles.
    (70, 64, 300, "bfloat16", {}, Config(128, 4, 1, 2)),
    (70, 64, 300, "bfloat16", {}, Config(256, 2, 2, 1)),
]


def problem(rows, width, vocabulary, dtype=jnp.float32, scale=1.0):
    hidden, head = normal(0, (rows, width), dtype, scale), normal(1, (vocabulary, width), dtype, 2 / width**0.5)
    return hidden, head, jax.random.randint(jax.random.key(2), (rows,), 0, vocabulary)


def simulated(config):
    return tuning.trial(linear_logprob_forward=config, linear_logprob_backward=config)


def call(hidden, head, targets, *, implementation, **options):
    implementation = {"xla": "reference"}.get(implementation, implementation)
    return linear_logprob(hidden, head, targets, implementation=implementation, **options)


def float64(hidden, head, targets, temperature=1.0, soft_cap=None):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    logits = (logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)) / temperature
    peak = logits.max(1, keepdims=True)
    lse = peak + np.log(np.exp(logits - peak).sum(1, keepdims=True))
    logps = logits - lse
    return logps[np.arange(len(logits)), np.asarray(targets)], -(np.exp(logps) * logps).sum(1), lse[:, 0]


@pytest.mark.parametrize(("rows", "width", "vocabulary", "dtype", "options", "config"), spread(CASES, 9))
def test_kernel_agrees_with_the_reference(rows, width, vocabulary, dtype, options, config):
    with simulated(config):
        args = problem(rows, width, vocabulary, dtype)
        assert_agrees("linear_logprob", partial(call, **options), args, differentiable=(0, 1))


@pytest.mark.parametrize("result", [0, 1, 2])
def test_kernel_gradient_of_each_result(result):
    def function(hidden, head, targets, implementation):
        return call(hidden, head, targets, implementation=implementation, soft_cap=5.0)[result]

    with simulated(SINGLE):
        assert_agrees("linear_logprob", function, problem(10, 64, 100, "bfloat16"), differentiable=(0, 1))


@pytest.mark.parametrize("scale", [1e-20, 100.0])
def test_kernel_with_tiny_and_huge_logits(scale):
    with simulated(SPLIT):
        assert_agrees("linear_logprob", call, problem(10, 64, 130, "bfloat16", scale), differentiable=(0, 1))


def test_kernel_under_vmap_and_with_a_traced_temperature():
    hidden, head, targets = problem(12, 64, 70, "bfloat16")

    def function(hidden, head, temperature, targets, implementation):
        def one(hidden, targets):
            return call(hidden, head, targets, implementation=implementation, temperature=temperature)

        return jax.vmap(one)(hidden.reshape(2, 6, 64), targets.reshape(2, 6))

    with simulated(SINGLE):
        assert_agrees("linear_logprob", function, (hidden, head, jnp.float32(0.7), targets), differentiable=(0, 1))


@pytest.mark.parametrize(
    ("vocabulary", "chunk"), [(96, 32), (97, 32), (97, 97), (31, 64), (65, 64), (1, 8), (40, None)]
)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 2.0, "soft_cap": 3.0}])
def test_chunked_agrees_with_numpy_float64(vocabulary, chunk, options):
    args = problem(7, 16, vocabulary)
    for found in (
        linear_logprob(*args, chunk=chunk, implementation="chunked", **options),
        linear_logprob(*args, implementation="reference", **options),
    ):
        for got, want in zip(found, float64(*args, **options), strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, want, **F32)


@pytest.mark.parametrize(("vocabulary", "chunk"), [(96, 32), (97, 32), (31, 64)])
@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"soft_cap": 3.0}])
def test_chunked_gradients_agree_with_the_materialised_form(vocabulary, chunk, options):
    hidden, head, targets = problem(9, 16, vocabulary)
    weights = [normal(3 + i, (9,)) for i in range(3)]

    def gradients(implementation):
        def loss(hidden, head):
            results = call(hidden, head, targets, implementation=implementation, chunk=chunk, **options)
            return sum((w * x).sum() for w, x in zip(weights, results, strict=True))

        return jax.grad(loss, argnums=(0, 1))(hidden, head)

    for got, want in zip(gradients("chunked"), gradients("reference"), strict=True):
        np.testing.assert_allclose(got, want, **F32)


def test_huge_logits_stay_finite_and_exact():
    hidden, head, targets = problem(5, 16, 50, scale=1e4)
    args = hidden, head, targets
    for chunk in (7, 16, 50):
        for got, want in zip(linear_logprob(*args, chunk=chunk), float64(*args), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-2)  # a unit in the last place of 1e5
        gradient = jax.grad(lambda h, w: sum(x.sum() for x in linear_logprob(h, w, targets)), (0, 1))(hidden, head)
        assert all(np.isfinite(g).all() for g in gradient)


def test_leading_axes_vmap_and_bfloat16():
    hidden, head, targets = problem(12, 16, 40)
    flat = linear_logprob(hidden, head, targets, chunk=16)
    folded = linear_logprob(hidden.reshape(3, 4, 16), head, targets.reshape(3, 4), chunk=16)
    mapped = jax.vmap(lambda h, t: linear_logprob(h, head, t, chunk=16))(
        hidden.reshape(3, 4, 16), targets.reshape(3, 4)
    )
    for i in range(3):
        np.testing.assert_array_equal(folded[i].reshape(-1), flat[i])
        np.testing.assert_allclose(mapped[i].reshape(-1), flat[i], **F32)
    half = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), targets
    for got, want in zip(linear_logprob(*half, chunk=16), float64(*half), strict=True):
        np.testing.assert_allclose(got, want, **F32)  # products are exact, sums are in float32


def test_never_holds_all_logits():
    hidden, head, targets = problem(64, 8, 4096)
    loss = jax.jit(jax.grad(lambda h: linear_logprob(h, head, targets, chunk=256).logp.sum()))
    assert "f32[64,4096]" not in loss.lower(hidden).compile().as_text()


def plain(loss):
    return lambda hidden, head: jax.grad(loss)(hidden, head)


def in_a_scan(loss):
    def total(hidden, head):
        def step(carry, _):
            return carry + loss(hidden, head), None

        return jax.lax.scan(step, 0.0, length=2)[0]

    return plain(total)


def recomputed(loss):
    return plain(jax.checkpoint(loss))


def jitted(loss):
    return plain(jax.jit(loss))


@pytest.mark.parametrize("wrap", [plain, in_a_scan, recomputed, jitted])
def test_the_gradient_of_a_frozen_head_costs_nothing(wrap):
    """Of the three products in the backward pass, `dz^T @ hidden`, and the only array of its shape, is not there."""
    hidden, head, targets = problem(24, 16, 96)

    def loss(hidden, head):
        return linear_logprob(hidden, head, targets, chunk=32).logp.sum()

    frozen = str(jax.make_jaxpr(wrap(loss))(hidden, head))
    trained = str(jax.make_jaxpr(lambda h, w: jax.grad(loss, argnums=(0, 1))(h, w))(hidden, head))
    assert "f32[96,16] = dynamic_update_slice" in trained and "f32[32,16] = dot_general" in trained
    assert "f32[96,16] = " not in frozen and "f32[32,16] = dot_general" not in frozen


@pytest.mark.parametrize(("rows", "vocabulary", "chunk"), [(1, 3, None), (701, 50257, None), (130, 1000, 129)])
def test_ragged_shapes_lower_for_an_h100(rows, vocabulary, chunk):
    """The simulator takes copies that the compiler refuses."""
    shapes = [((rows, 768), "bfloat16"), ((vocabulary, 768), "bfloat16"), ((rows,), "int32")]

    def loss(*args):
        return linear_logprob(*args, chunk=chunk, implementation="mosaic_gpu").logp.sum()

    lowered = hopper.lower(jax.grad(loss, argnums=(0, 1)), *(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert set(hopper.kernel_counts(lowered)) == {"linear_logprob_forward", "linear_logprob_backward"}


def test_the_kernel_path_also_skips_a_frozen_head():
    shapes = (
        jax.ShapeDtypeStruct(s, d) for s, d in (((256, 512), "bfloat16"), ((4096, 512), "bfloat16"), ((256,), "int32"))
    )
    hidden, head, targets = shapes

    def program(argnums):
        def loss(hidden, head, targets):
            return linear_logprob(hidden, head, targets, chunk=2048).logp.sum()

        lowered = hopper.lower(jax.grad(loss, argnums), hidden, head, targets)
        assert set(hopper.kernel_counts(lowered)) == {"linear_logprob_forward", "linear_logprob_backward"}
        return lowered.as_text().count("stablehlo.dot_general")

    assert (program(0), program((0, 1))) == (1, 2)


def test_no_gradient_for_the_temperature():
    hidden, head, targets = problem(4, 16, 40)
    for implementation in ("chunked", "reference"):
        of = jax.grad(
            lambda t, i=implementation: linear_logprob(
                hidden, head, targets, temperature=t, implementation=i
            ).logp.sum()
        )
        assert of(0.7) == 0


def test_heuristic_fills_the_cores():
    for rows in (1, 128, 1000, 4096, 5000, 8192, 65536):
        config = heuristic(rows, 128256)
        assert 0.9 < config.group * config.splits / hopper.CORES <= 1


def test_says_what_is_wrong():
    hidden, head, targets = problem(4, 20, 40)
    with pytest.raises(NotImplementedError) as error:
        linear_logprob(hidden, head.astype(jnp.bfloat16), targets, implementation="mosaic_gpu")
    for reason in ("the device is 'cpu'", "dtype float32", "head bfloat16 beside hidden float32", "width 20"):
        assert reason in str(error.value)
    with pytest.raises(ValueError, match=r"accepted: 'mosaic_gpu', 'chunked', 'reference', None"):
        linear_logprob(hidden, head, targets, implementation="xla")
    with pytest.raises(ValueError, match=r"\(4, 20\)"):
        linear_logprob(hidden, head[:, :8], targets)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        linear_logprob(hidden, head, targets[:3])

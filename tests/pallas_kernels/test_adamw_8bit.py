"""adamw_8bit: the kernel simulated against the reference, the reference against NumPy and against AdamW in float32."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Moments, adamw_8bit, hopper, init_moments, tuning
from pallas_kernels.adamw_8bit import mosaic_gpu, reference
from tests.helpers.agreement import device_of, normal
from tests.helpers.tolerances import F32, KERNEL

NUMBERS = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
CASES = [
    *itertools.product(
        [(1024,), (8, 384), (2, 4, 640)], ["float32", "bfloat16"], ["float32", "bfloat16"], [None, 0], [4]
    ),
    *itertools.product([(16, 256), (12, 256)], ["bfloat16"], ["bfloat16"], [0], [8, 16]),
]


@partial(jax.jit, static_argnames=("implementation", "steps"))
def run(param, grad, moments, key=None, *, implementation="xla", steps=1, first=1, **numbers):
    """Some steps; each with the gradient in another size."""
    for step in range(steps):
        scaled = (grad * (1 + step)).astype(grad.dtype)
        options = NUMBERS | numbers | {"step": first + step, "key": key, "implementation": implementation}
        param, moments = adamw_8bit(param, scaled, moments, **options)
    return param, moments


def start(shape, dtype="float32", steps=3):
    """A parameter, a gradient whose blocks differ in size, and moments that are not zero."""
    sizes = 10.0 ** jax.random.randint(jax.random.key(3), shape, -4, 1).astype(jnp.float32)
    param, grad = normal(0, shape, dtype), normal(1, shape) * sizes
    return param, grad, run(param, normal(2, shape) * sizes, init_moments(param), steps=steps)[1]


def assert_same(found, wanted):
    """Equal, but for what another order of roundings moves over the edge between two codes or two bfloat16."""
    for name, got, want in zip(
        ("param", *Moments._fields), jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True
    ):
        assert got.dtype == want.dtype and got.shape == want.shape
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        if np.issubdtype(want.dtype, np.integer) or name.endswith("codes"):
            off = np.abs(got - want)
            assert off.max() <= 1 and (off > 0).mean() < 0.01, name
        else:
            off = np.abs(got - want) > KERNEL["adamw_8bit"]["float32"] * np.abs(want).max()
            assert off.mean() < 0.01, name
            np.testing.assert_allclose(got, want, rtol=2**-7, err_msg=name)


@pytest.mark.parametrize(("shape", "dtype", "grad_dtype", "seed", "rows"), CASES)
def test_kernel_agrees_with_the_reference(shape, dtype, grad_dtype, seed, rows):
    param, grad, moments = start(shape, dtype)
    args = param, grad.astype(grad_dtype), moments, None if seed is None else jax.random.key(seed)
    with hopper.simulated(), tuning.trial(adamw_8bit_step=mosaic_gpu.Config(rows=rows)):
        found = run(*args, implementation="mosaic_gpu", first=4)
    assert_same(found, run(*args, first=4))


def test_kernel_under_vmap_agrees_with_the_reference():
    param, grad, _ = start((2, 1024))
    rates = jnp.array([0.1, 0.2])

    def step(implementation):
        def one(p, g, rate):
            return run(p, g, init_moments(p), learning_rate=rate, implementation=implementation)

        return jax.vmap(one)(param, grad, rates)

    with hopper.simulated():
        found = step("mosaic_gpu")
    assert_same(found, step("xla"))


def test_kernel_writes_in_place():
    param = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    args = param, param, jax.eval_shape(init_moments, param)
    text = hopper.lower(partial(run, implementation="mosaic_gpu"), *args).as_text()
    for result in range(5):
        assert f"output_tuple_indices = [{result}]" in text


@pytest.mark.parametrize("shape", [(1,), (255,), (257,), (3, 100), (16, 64)])
def test_reference_agrees_with_numpy(shape):
    param, grad, moments = start(shape)
    p, g = np.asarray(param, np.float64).ravel(), np.asarray(grad, np.float64).ravel()
    block = np.arange(p.size) // 256
    c = np.asarray(moments.m_codes, np.float64).ravel()
    m = np.asarray(moments.m_scales, np.float64)[block] * np.sign(c) * (c / 127) ** 2
    v = (np.asarray(moments.v_scales, np.float64)[block] * (np.asarray(moments.v_codes).ravel() / 255.0) ** 2) ** 2
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
    p -= 1e-2 * (m / (1 - 0.9**4) / (np.sqrt(v / (1 - 0.99**4)) + 1e-6) + 0.1 * p)
    new, updated = run(param, grad, moments, first=4)
    np.testing.assert_allclose(new.ravel(), p, **F32)
    largest = [[np.abs(x[block == b]).max() for b in range(block[-1] + 1)] for x in (m, np.sqrt(v))]
    np.testing.assert_allclose(updated.m_scales, largest[0], rtol=1e-5)
    np.testing.assert_allclose(updated.v_scales, largest[1], rtol=1e-5)
    m_code = np.sign(m) * 127 * np.sqrt(np.abs(m) / np.array(largest[0])[block])
    v_code = 255 * np.sqrt(np.sqrt(v) / np.array(largest[1])[block])
    assert np.abs(np.asarray(updated.m_codes).ravel() - m_code).max() < 0.51
    assert np.abs(np.asarray(updated.v_codes).ravel() - np.maximum(v_code, 1)).max() < 1.01


def test_300_steps_follow_adamw_in_float32():
    """A network of two layers learns a noisy function; the loss of every step, smoothed, within 1%."""
    weights = {"w": normal(0, (16, 64), scale=0.25), "b": jnp.zeros(64), "out": normal(1, (64, 8), scale=0.125)}
    x = normal(2, (4096, 16))
    y = jnp.tanh(x @ normal(3, (16, 64), scale=0.5)) @ normal(4, (64, 8), scale=0.3) + normal(5, (4096, 8), scale=0.1)
    rows = jax.random.randint(jax.random.key(6), (300, 128), 0, 4096)

    def loss(w, rows):
        hidden = jnp.tanh(x[rows] @ w["w"] + jnp.broadcast_to(w["b"], (128, 64)))
        return jnp.mean((hidden @ w["out"] - y[rows]) ** 2)

    numbers = {"learning_rate": 5e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

    def exact(p, g, state, t):
        m, v = 0.9 * state[0] + 0.1 * g, 0.999 * state[1] + 0.001 * g**2
        update = m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
        return p - 5e-3 * (update + 0.01 * p), (m, v)

    def eight_bit(p, g, state, t):
        return adamw_8bit(p, g, state, step=t, **numbers)

    @partial(jax.jit, static_argnums=0)
    def train(update, state):
        def step(carry, batch):
            w, state, t = carry
            value, g = jax.value_and_grad(loss)(w, batch)
            pairs = {name: update(w[name], g[name], state[name], t) for name in w}
            return ({n: a for n, (a, _) in pairs.items()}, {n: b for n, (_, b) in pairs.items()}, t + 1), value

        return jax.lax.scan(step, (weights, state, jnp.float32(1)), rows)[1]

    wanted = train(exact, {name: (jnp.zeros_like(w), jnp.zeros_like(w)) for name, w in weights.items()})
    found = train(eight_bit, {name: init_moments(w) for name, w in weights.items()})
    smooth = partial(np.convolve, np.full(10, 0.1), mode="valid")
    assert wanted[-1] < 0.15 * wanted[0]
    np.testing.assert_allclose(smooth(found), smooth(wanted), rtol=0.01)


def test_state_is_3_8_times_smaller_than_in_float32():
    param = jnp.zeros((100, 256))
    assert sum(x.nbytes for x in init_moments(param)) <= 8 * param.size / 3.8


def test_bfloat16_is_rounded_stochastically_without_bias():
    exact = jnp.linspace(1.0, 1.0 + 2**-7, 257)[:256].reshape(1, 256)  # between two neighbours
    bits = [reference.random_bits((1, 256), jnp.uint32(seed), jnp.int32(0)) >> 16 for seed in range(0, 400_000, 1000)]
    rounded = np.stack([reference.round_to_bfloat16(exact, b) for b in bits])
    assert set(np.unique(rounded)) <= {1.0, 1.0 + 2**-7}
    # 400 draws: a standard deviation of at most 0.025 steps an element, 0.0016 of the mean over all.
    np.testing.assert_allclose(rounded.mean(axis=0), exact, atol=2**-7 * 0.11)
    np.testing.assert_allclose(rounded.mean(), exact.mean(), atol=2**-7 * 0.006)


def test_second_moment_is_rounded_without_bias():
    root = jnp.linspace(0.05, 1.0, 256).reshape(1, 256)
    bits = [
        reference.random_bits((1, 256), jnp.uint32(seed), jnp.int32(0)) & 0x7FFF for seed in range(0, 400_000, 1000)
    ]
    decoded = np.stack([reference.decode_root_v(*reference.encode_root_v(root, b)) for b in bits])
    np.testing.assert_allclose(decoded.mean(axis=0), root, rtol=0.005)
    np.testing.assert_allclose((decoded.mean(axis=0) / root).mean(), 1.0, rtol=2e-4)


def test_random_bits_look_random():
    bits = np.asarray(reference.random_bits((256, 256), reference.mix(jnp.uint32(7)), jnp.int32(5)))
    each = (bits[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    np.testing.assert_allclose(each.mean(axis=(0, 1)), 0.5, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(each.reshape(-1, 32).T) - np.eye(32), 0, atol=0.025)
    neighbours = np.corrcoef(bits[:, :-1].ravel(), bits[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.02 and len(np.unique(bits)) > bits.size * 0.999


def test_steps_too_small_for_bfloat16_are_lost_without_a_key_only():
    param, grad = jnp.ones((4, 256), jnp.bfloat16), jnp.ones((4, 256))

    def train(key):
        def step(carry, t):
            return adamw_8bit(carry[0], grad, carry[1], step=t, learning_rate=1e-4, key=key), None

        return jax.lax.scan(step, (param, init_moments(param)), jnp.arange(1, 101))[0][0]

    assert np.all(np.asarray(train(None)) == 1)
    np.testing.assert_allclose(train(jax.random.key(0)).astype(jnp.float32).mean(), 0.99, atol=1e-3)


def test_key_and_step_change_the_bits_and_nothing_else_does():
    param, grad, moments = start((4, 256), "bfloat16")
    steps = [run(param, grad, moments, jax.random.key(k), first=t)[1].v_codes for k, t in ((0, 4), (1, 4), (0, 5))]
    assert all(np.any(np.asarray(a) != np.asarray(b)) for a, b in itertools.combinations(steps, 2))
    again = run(param, grad, moments, jax.random.key(0), first=4)[1].v_codes
    np.testing.assert_array_equal(again, steps[0])


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_a_block_of_zeros_stays_where_it_is(implementation):
    param = normal(0, (4, 256)).at[1].set(0.0)
    grad = normal(1, (4, 256)).at[:2].set(0.0)
    with device_of(implementation):
        new, moments = run(param, grad, init_moments(param), implementation=implementation, steps=2, weight_decay=0.0)
    np.testing.assert_array_equal(new[:2], param[:2])
    assert np.all(np.asarray(moments.m_codes[:2]) == 0) and all(np.isfinite(x).all() for x in moments)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e18])
def test_first_step_is_as_long_whatever_the_size_of_the_gradient(size):
    param, grad = normal(0, (4, 256)), normal(1, (4, 256))
    options = {"steps": 1, "eps": 0.0, "weight_decay": 0.0}
    new, moments = run(param, grad * size, init_moments(param), **options)
    # The square of 1e-30 is 0 in float32: eps is what keeps such a step finite.
    if size > 1e-19:
        np.testing.assert_allclose(new, param - 0.01 * jnp.sign(grad), atol=1e-6)
    with_eps, _ = run(param, grad * size, init_moments(param), steps=3)
    assert np.isfinite(with_eps).all() and all(np.isfinite(x).all() for x in moments)


@pytest.mark.parametrize(("implementation", "bad"), [*itertools.product(["xla", "mosaic_gpu"], [np.nan, np.inf])])
def test_a_gradient_that_is_not_finite_stays_in_its_block(implementation, bad):
    param, grad, moments = start((4, 256), "bfloat16")
    key = jax.random.key(0)
    with device_of(implementation):
        found = run(param, grad.at[1, 7].set(bad), moments, key, implementation=implementation, steps=2, first=4)
    wanted = run(param, grad, moments, key, steps=2, first=4)
    others = jnp.array([0, 2, 3])
    assert_same(jax.tree.map(lambda x: x[others], found), jax.tree.map(lambda x: x[others], wanted))
    assert np.isnan(np.asarray(found[0], np.float32)[1]).all() and not np.isfinite(found[1].m_scales[1])


def test_pieces_of_whole_blocks_take_the_steps_of_the_whole():
    param, grad, moments = start((6, 512))
    halves = [run(*jax.tree.map(lambda x, i=i: jnp.split(x, 2)[i], (param, grad, moments)), first=4) for i in (0, 1)]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *halves)
    whole = run(param, grad, moments, first=4)
    # Random bits of the second half are others: v may be a code higher or lower.
    np.testing.assert_allclose(joined[1].v_codes.astype(int), whole[1].v_codes.astype(int), atol=1)
    without_v = [(p, m._replace(v_codes=None)) for p, m in (joined, whole)]
    jax.tree.map(np.testing.assert_array_equal, *without_v)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_portions_take_the_step_of_the_whole(monkeypatch, dtype, blocks):
    param, grad, moments = start((7, 333), dtype)  # 10 blocks, the last of 27 elements
    step = partial(adamw_8bit, param, grad, moments, step=4, key=jax.random.key(0), **NUMBERS)
    whole = jax.jit(lambda: step())()
    monkeypatch.setattr(reference, "PORTION", blocks)
    assert_same(jax.jit(lambda: step())(), whole)


def test_a_parameter_without_elements_stays_as_it_is():
    param = jnp.zeros((3, 0))
    new, moments = run(param, param, init_moments(param))
    assert new.shape == (3, 0) and [x.shape for x in moments] == [(3, 0), (0,), (3, 0), (0,)]


def test_temporaries_are_those_of_a_portion(monkeypatch):
    monkeypatch.setattr(reference, "PORTION", 64)
    param = jnp.zeros((1024, 1024))
    step = jax.jit(partial(adamw_8bit, step=1, learning_rate=0.1), donate_argnums=(0, 2))
    need = step.lower(param, param, init_moments(param)).compile().memory_analysis()
    assert need.temp_size_in_bytes < 0.5 * param.nbytes  # 3.3 of it in one portion


def test_numbers_may_change_without_a_new_compilation():
    param, grad, moments = start((2, 256))

    @jax.jit
    def step(t, rate):
        return adamw_8bit(param, grad, moments, step=t, learning_rate=rate, b1=rate, weight_decay=rate)

    for t in (1, 2, 3):
        step(t, 0.1 * t)
    assert step._cache_size() == 1


def test_says_what_is_wrong():
    param = jnp.zeros((3, 100), jnp.float16)
    with pytest.raises(NotImplementedError) as error:
        adamw_8bit(param, param, init_moments(param), step=1, learning_rate=0.1, implementation="mosaic_gpu")
    for reason in ("the device is 'cpu'", "param float16", "grad float16", "300 elements; accepted: multiples of 1024"):
        assert reason in str(error.value)
    call = partial(adamw_8bit, step=1, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"accepted: 'mosaic_gpu', 'xla', None"):
        call(param, param, init_moments(param), implementation="triton")
    with pytest.raises(ValueError, match=r"grad \(100,\) is not of shape \(3, 100\)"):
        call(param, param[0], init_moments(param))
    with pytest.raises(ValueError, match=r"m_scales \(1,\) is not of shape \(2,\), which param \(3, 100\) needs"):
        call(param, param, init_moments(param)._replace(m_scales=jnp.zeros(1)))


@pytest.mark.parametrize("check", [False, True])
def test_kernel_inside_shard_map_agrees_with_the_reference(check):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    args = start((4, 256), "bfloat16")
    specs = jax.tree.map(lambda x: jax.sharding.PartitionSpec("d"), args)
    options = {"mesh": mesh, "in_specs": specs, "out_specs": (specs[0], specs[2]), "check_vma": check}
    with hopper.simulated():
        found = jax.shard_map(partial(run, implementation="mosaic_gpu"), **options)(*args)
    assert_same(found, jax.shard_map(run, **options)(*args))
    assert_same(found, run(*args))

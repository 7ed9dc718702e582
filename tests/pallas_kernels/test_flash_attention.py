"""flash_attention: the kernels simulated against the reference, the reference against NumPy."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from tests.helpers.agreement import assert_agrees, assert_close, normal
from tests.helpers.cases import spread
from tests.helpers.tolerances import F32


class Case(NamedTuple):
    lengths: tuple[int, int]  # of queries and keys
    heads: tuple[int, int] = (2, 1)
    width: int = 64
    segments: str | None = None  # how the rows are packed
    window: Any = None
    causal: bool = True
    soft_cap: float | None = None
    scale: float | None = None
    dtype: str = "bfloat16"
    batch: int = 1
    gradients: bool = True


def packed(counts: list[tuple[int, int]], total: int) -> list[int]:
    """Each segment as often as it counts, then padding."""
    row = [segment for segment, count in counts for _ in range(count)]
    return row[:total] + [0] * (total - len(row))


ROWS = {
    "left padding": lambda n: packed([(0, n // 3), (1, n)], n),
    "right padding": lambda n: packed([(1, n - n // 4)], n),
    "packed": lambda n: packed([(1, n // 4), (2, n // 3), (7, n // 5)], n),
    "packed, padding between": lambda n: packed([(3, n // 4), (0, 5), (1, n // 3)], n),
    "out of order": lambda n: [1 + (i // 3) % 2 for i in range(n)],
    "padding alone": lambda n: [0] * n,
}


def problem(case: Case):
    (S, C), (N, K) = case.lengths, case.heads
    q = normal(0, (case.batch, S, N, case.width), case.dtype)
    k, v = (normal(i, (case.batch, C, K, case.width), case.dtype) for i in (1, 2))
    if case.segments is None:
        return (q, k, v), None, None
    rows = [ROWS[case.segments]] * (case.batch - 1) + [ROWS[case.segments if case.batch == 1 else "left padding"]]
    return (q, k, v), *(jnp.array([row(n) for row in rows], jnp.int32) for n in case.lengths)


def call(case: Case, q, k, v, segments, kv_segments, implementation=None):
    window = jnp.int32(case.window) if case.window is not None and case.segments else case.window  # traced at times
    return flash_attention(
        q,
        k,
        v,
        segments=segments,
        kv_segments=kv_segments,
        causal=case.causal,
        window=window,
        scale=case.scale,
        soft_cap=case.soft_cap,
        implementation=implementation,
    )


CASES = [
    # lengths
    Case((1, 1), gradients=False),
    Case((8, 1), causal=False, gradients=False),
    Case((64, 64)),
    Case((65, 63), causal=False, gradients=False),
    Case((128, 128), (4, 2)),
    Case((129, 129), (3, 3), gradients=False),
    Case((140, 140), (4, 1)),
    Case((3, 260), causal=False, gradients=False),
    Case((140, 3), causal=False),
    Case((150, 60), gradients=False),
    Case((60, 150)),
    # widths and dtypes
    Case((136, 136), width=128),
    Case((72, 72), (4, 2), width=128, dtype="float16"),
    Case((40, 200), width=128, causal=False, gradients=False),
    Case((70, 70), width=256),
    Case((33, 140), (2, 2), width=256, dtype="float16", causal=False, gradients=False),
    Case((90, 90), dtype="float16", gradients=False),
    # windows
    Case((200, 200), window=1, gradients=False),
    Case((200, 200), window=70),
    Case((140, 140), window=1000, gradients=False),
    Case((100, 160), window=30, causal=False),
    # segments, windows traced
    Case((130, 130), segments="left padding"),
    Case((130, 130), segments="right padding", window=50),
    Case((130, 130), segments="packed", batch=2),
    Case((180, 180), segments="packed, padding between", window=20, gradients=False),
    Case((90, 90), segments="out of order"),
    Case((70, 150), segments="packed", causal=False),
    Case((70, 70), segments="padding alone"),
    # scores
    Case((80, 80), soft_cap=1.5, gradients=False),
    Case((80, 80), soft_cap=30.0, scale=1.0, segments="packed", window=1 << 30),
    Case((80, 80), scale=0.02, width=128, soft_cap=0.5),
]


def name(case: Case) -> str:
    changed = {field: value for field, value in case._asdict().items() if value != Case._field_defaults.get(field)}
    return ", ".join(f"{field} {value}" for field, value in changed.items())


STRIPS = [
    Case((1, 1), dtype="float32"),
    Case((45, 45), (4, 1), dtype="float32"),
    Case((128, 128)),
    Case((133, 133), (4, 2), segments="left padding", batch=2),
    Case((200, 200), (3, 3), dtype="float32", segments="packed, padding between"),
    Case((257, 257), window=50, dtype="float32"),
    Case((190, 190), window=1, soft_cap=2.0),
    Case((160, 160), window=33, segments="packed", dtype="float32"),  # traced
    Case((300, 300), segments="padding alone", dtype="float32"),
    Case((700, 700), width=16, dtype="float32"),
]


@pytest.mark.parametrize("case", STRIPS, ids=name)
def test_strips_agree_with_the_reference(case: Case):
    tensors, *segments = problem(case)
    results = {}
    for implementation in ("strips", "xla"):

        def weighted(*tensors, implementation=implementation):
            out, lse = call(case, *tensors, *segments, implementation)
            noise = normal(7, out.shape, "float32")
            return (out.astype(jnp.float32) * noise).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum(), (out, lse)

        results[implementation] = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(*tensors)
    tolerance = 1e-5 if case.dtype == "float32" else 2e-2
    for ours, theirs in zip(jax.tree.leaves(results["strips"]), jax.tree.leaves(results["xla"]), strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (ours, theirs)), rtol=tolerance, atol=tolerance)


def test_strips_keep_nothing_over_queries_and_keys():
    (q, k, v), *_ = problem(Case((256, 256), width=32, dtype="float32"))
    _, pullback = jax.vjp(lambda *qkv: flash_attention(*qkv, implementation="strips").out, q, k, v)
    assert max(x.size for x in jax.tree.leaves(pullback)) == q.size


def test_strips_are_for_causal_rows():
    (q, k, v), *_ = problem(Case((64, 64)))
    with pytest.raises(NotImplementedError, match="64 queries and 8 keys"):
        flash_attention(q, k[:, :8], v[:, :8], implementation="strips")
    with pytest.raises(NotImplementedError, match="may see every key"):
        flash_attention(q, k, v, causal=False, implementation="strips")


@pytest.mark.parametrize("case", spread(CASES, 9), ids=name)
def test_kernels_agree_with_the_reference(case: Case):
    tensors, *segments = problem(case)

    def function(*args, implementation):
        return call(case, *args, implementation)

    assert_agrees("flash_attention", function, (*tensors, *segments), (0, 1, 2) if case.gradients else ())


@pytest.mark.parametrize("magnitude", [1e-4, 30.0])
def test_kernels_agree_at_extreme_magnitudes(magnitude):
    case = Case((100, 100), segments="packed")
    (q, k, v), *segments = problem(case)
    args = (q * magnitude, k * magnitude, v, *segments)
    # Results alone: with the largest scores in the thousands the softmax is a maximum, and its gradients are rounding.
    assert_agrees("flash_attention", lambda *args, implementation: call(case, *args, implementation), args)


def numpy_attention(case: Case, q, k, v, segments, kv_segments):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    segments, kv_segments = (None if x is None else np.asarray(x) for x in (segments, kv_segments))
    (S, C), (N, K) = case.lengths, case.heads
    k, v = (x.repeat(N // K, axis=2) for x in (k, v))
    scores = np.einsum("bsnh,bcnh->bnsc", q, k) * (case.width**-0.5 if case.scale is None else case.scale)
    if case.soft_cap is not None:
        scores = np.tanh(scores / case.soft_cap) * case.soft_cap
    out, lse = np.zeros(q.shape), np.full((case.batch, N, S), -np.inf)
    for b, s in np.ndindex(case.batch, S):
        sees = np.arange(C) <= s if case.causal else np.full(C, True)
        if case.window is not None:
            sees &= np.arange(C) > s - case.window
        if segments is not None:
            sees &= (kv_segments[b] == segments[b, s]) & (kv_segments[b] != 0)
        if sees.any():
            visible = scores[b, :, s, sees]  # [keys, N]
            top = visible.max(axis=0)
            lse[b, :, s] = top + np.log(np.exp(visible - top).sum(axis=0))
            out[b, s] = np.einsum("cn,cnh->nh", np.exp(visible - lse[b, :, s]), v[b, sees])
    return out, lse


@pytest.mark.parametrize(
    "case",
    [case._replace(width=8, dtype="float32") for case in CASES if case.width == 64],
    ids=name,
)
def test_reference_agrees_with_numpy(case: Case):
    tensors, *segments = problem(case)
    found = call(case, *tensors, *segments)
    for got, want in zip(found, numpy_attention(case, *tensors, *segments), strict=True):
        np.testing.assert_allclose(got, want, **F32)


def test_reference_gradients_agree_with_finite_differences():
    case = Case((9, 9), (4, 2), 8, "packed", 3, soft_cap=2.0, dtype="float32")
    tensors, *segments = problem(case)
    cotangent = np.asarray(normal(5, tensors[0].shape)), np.asarray(normal(6, (1, 4, 9)))

    def exact(q, k, v):
        out, lse = numpy_attention(case, q, k, v, *segments)
        return (out * cotangent[0]).sum() + np.where(np.isfinite(lse), lse * cotangent[1], 0).sum()

    def traced(q, k, v):
        out, lse = call(case, q, k, v, *segments)
        return (out * cotangent[0]).sum() + jnp.where(jnp.isfinite(lse), lse * cotangent[1], 0.0).sum()

    gradients = jax.grad(traced, argnums=(0, 1, 2))(*tensors)
    for i, gradient in enumerate(gradients):
        direction = np.asarray(normal(7 + i, tensors[i].shape), np.float64)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [np.asarray(x, np.float64) for x in tensors]
            moved[i] = moved[i] + step * direction
            ends.append(exact(*moved))
        np.testing.assert_allclose((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4)


def test_queries_without_keys_have_zero_results_and_gradients():
    case = Case((12, 12), width=8, segments="left padding", dtype="float32")
    (q, k, v), *segments = problem(case)
    (out, lse), pull = jax.vjp(lambda q, k, v: tuple(call(case, q, k, v, *segments)), q, k, v)
    dq, dk, dv = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    assert np.all(out[0, :4] == 0) and np.all(lse[0, :, :4] == -np.inf) and np.isfinite(lse[0, :, 4:]).all()
    assert np.all(dq[0, :4] == 0) and np.all(dk[0, :4] == 0) and np.all(dv[0, :4] == 0)
    assert all(np.isfinite(gradient).all() for gradient in (dq, dk, dv))


def test_half_precision_keeps_its_dtype_and_lse_is_float32():
    tensors, *_ = problem(Case((12, 12), width=8))
    out, lse = flash_attention(*tensors)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


def test_vmap_checkpoint_and_scan_over_windows():
    case = Case((10, 10), width=8, dtype="float32", batch=3)
    tensors, *_ = problem(case)
    attend = partial(call, case, segments=None, kv_segments=None)
    plain = attend(*tensors)
    mapped = jax.vmap(lambda *row: attend(*(x[None] for x in row)))(*tensors)
    assert_close([x[:, 0] for x in mapped], list(plain), 1e-6)

    def loss(q, attend):
        return (attend(q, *tensors[1:]).out ** 2).sum()

    gradient, recomputed = (jax.grad(loss)(tensors[0], f) for f in (attend, jax.checkpoint(attend)))
    np.testing.assert_allclose(recomputed, gradient, **F32)

    windows = jnp.array([3, 1 << 30], jnp.int32)
    _, scanned = jax.lax.scan(lambda _, window: (None, flash_attention(*tensors, window=window)), None, windows)
    assert_close(
        jax.tree.map(lambda *xs: jnp.stack(xs), flash_attention(*tensors, window=3), flash_attention(*tensors)),
        scanned,
        1e-6,
    )


def test_kernels_under_vmap_and_jit():
    case = Case((70, 70), batch=2)
    tensors, *_ = problem(case)

    def function(*args, implementation):
        attend = partial(flash_attention, implementation=implementation)
        return jax.vmap(jax.jit(lambda *row: attend(*(x[None] for x in row))))(*args)

    assert_agrees("flash_attention", function, tensors, (0, 1, 2))


def test_says_what_is_wrong():
    q, k = jnp.zeros((1, 4, 4, 48)), jnp.zeros((1, 6, 2, 48))
    with pytest.raises(NotImplementedError) as error:
        flash_attention(q, k, k, implementation="mosaic_gpu")
    for reason in ("the device is 'cpu'", "dtype float32", "head width 48"):
        assert reason in str(error.value)
    with pytest.raises(ValueError, match=r"accepted: 'mosaic_gpu', 'strips', 'xla', None"):
        flash_attention(q, k, k, implementation="triton")
    with pytest.raises(ValueError, match=r"do not fit"):
        flash_attention(q, k[:, :, :1], k)
    with pytest.raises(ValueError, match=r"do not fit"):
        flash_attention(q[:, :, :3], k, k)
    with pytest.raises(ValueError, match=r"differ in dtype"):
        flash_attention(q, k, k.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"segments \(1, 4\) and kv_segments \(1, 4\)"):
        flash_attention(q, k, k, segments=jnp.ones((1, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"without segments"):
        flash_attention(q, k, k, kv_segments=jnp.ones((1, 6), jnp.int32))
    with pytest.raises(ValueError, match=r"window=0"):
        flash_attention(q, k, k, window=0)
    with pytest.raises(ValueError, match=r"soft_cap=-1"):
        flash_attention(q, k, k, soft_cap=-1.0)

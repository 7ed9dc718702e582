"""Attention whose scores never leave the chip: causal, windowed, packed, grouped, soft-capped."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, Operation, hopper_kernel
from pallas_kernels.flash_attention import mosaic_gpu, mosaic_gpu_vjp, strips, visibility
from pallas_kernels.flash_attention.reference import flash_attention_reference
from pallas_kernels.numerics import padded


class Attended(NamedTuple):
    """Result and what the softmax was divided by."""

    out: Float[Array, "B S N H"]  # in the dtype of `q`
    lse: Float[Array, "B N S"]  # float32, natural logarithm of the sum of exponentials of the scores; -inf: no key seen


def flash_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K H"],
    *,
    segments: Int[Array, "B S"] | None = None,
    kv_segments: Int[Array, "B C"] | None = None,
    causal: bool = True,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Attended:
    """`softmax(scale q k^T, over the keys that a query sees) v`; softmax in float32, no scores in memory.

    Equivalent, for N == K and one sequence, to

        scores = scale * q @ k.T
        scores = soft_cap * tanh(scores / soft_cap)                       with a soft cap
        s, c = arange(S)[:, None], arange(C)[None, :]
        seen = (segments[s] == kv_segments[c]) & (kv_segments[c] != 0) & (c <= s) & (s - c < window)
        lse = logsumexp(where(seen, scores, -inf), axis=-1)
        out = exp(scores - lse) @ v

    A query that sees no key gets `out` 0, `lse` -inf and gradients 0.

    Args:
      q: queries; query s stands at index s, also if S != C.
      k: keys; head n of the queries attends to head `n // (N // K)` of these.
      v: values.
      segments: number of the sequence to which a token of a packed row belongs, 0 at padding on either side. By
        default all belong to one.
      kv_segments: the same of the keys; by default `segments`.
      causal: no query sees a key of a higher index.
      window: how many keys a query sees at most, its own and those before it; an array if layers differ in it, where a
        number above every length means all.
      scale: of the scores; `H ** -0.5` by default.
      soft_cap: bounds the scores, before the mask (Gemma 2).
      implementation: "mosaic_gpu", "strips" (causal: XLA without most of what is hidden), "xla", or None for the
        first of them that can serve the call.

    Returns:
      `(out, lse)`.

    Gradients flow from both results to `q`, `k` and `v`.

    Raises:
      ValueError: shapes or dtypes that do not belong together, an unknown implementation.
      NotImplementedError: the named implementation cannot serve the call; all reasons.

    Reference: Dao et al., FlashAttention, 2022; Shah et al., FlashAttention-3, 2024.
    """
    kv_segments = segments if kv_segments is None else kv_segments
    _check(q, k, v, segments, kv_segments, window, soft_cap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Attended(*OPERATION(implementation, q, k, v, segments, kv_segments, window, causal, scale, soft_cap))


def _check(q, k, v, segments, kv_segments, window, soft_cap):
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit [B, S, N, H], [B, C, K, H] twice, K | N")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype} and v {v.dtype} differ in dtype")
    if kv_segments is not None and segments is None:
        raise ValueError("kv_segments without segments")
    if segments is not None and (segments.shape, kv_segments.shape) != (q.shape[:2], k.shape[:2]):
        raise ValueError(
            f"segments {segments.shape} and kv_segments {kv_segments.shape} do not fit {q.shape[:2]}, {k.shape[:2]}"
        )
    if isinstance(window, int) and window < 1:
        raise ValueError(f"window={window}; accepted: at least 1")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap={soft_cap}; accepted: above 0")


class _Passes(NamedTuple):
    """What an implementation makes of segments and window, and its passes, which take that."""

    seen: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


_KERNELS = _Passes(visibility.operands, mosaic_gpu.flash_attention_forward, mosaic_gpu_vjp.flash_attention_backward)
_STRIPS = _Passes(strips.cut, strips.flash_attention_forward, strips.flash_attention_backward)


class _Options(NamedTuple):
    """What is known while tracing."""

    passes: _Passes
    lengths: tuple[int, int]  # of queries and keys, before padding
    window: int | None
    causal: bool
    scale: float
    soft_cap: float | None

    def seen(self, segments, kv_segments, window):
        """What the passes take, of which tokens see one another."""
        return self.passes.seen(*self.lengths, segments, kv_segments, self.window if window is None else window)


def _differentiable(passes, multiple, q, k, v, segments, kv_segments, window, causal, scale, soft_cap):
    static, traced = (window, None) if window is None or isinstance(window, int) else (None, window)
    options = _Options(passes, (q.shape[1], k.shape[1]), static, causal, scale, soft_cap)
    q, k, v = (padded(x, multiple, axis=1) for x in (q, k, v))
    out, lse = _attend(q, k, v, segments, kv_segments, traced, options)
    return out[:, : options.lengths[0]], lse[:, :, : options.lengths[0]]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, segments, kv_segments, window, options):
    return _forward(q, k, v, segments, kv_segments, window, options)[0]


def _forward(q, k, v, segments, kv_segments, window, options):
    seen = options.seen(segments, kv_segments, window)
    out, lse = options.passes.forward(q, k, v, seen, options.causal, options.scale, options.soft_cap)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, segments, kv_segments, window, out, lse)


def _backward(options, residuals, cotangents):
    q, k, v, segments, kv_segments, window, out, lse = residuals
    seen = options.seen(segments, kv_segments, window)
    gradients = options.passes.backward(
        q, k, v, out, lse, *cotangents, seen, options.causal, options.scale, options.soft_cap
    )
    return *gradients, None, None, None


_attend.defvjp(_forward, _backward)

OPERATION = Operation(
    "flash_attention",
    {
        "mosaic_gpu": hopper_kernel(partial(_differentiable, _KERNELS, 8), mosaic_gpu.reasons),  # whole tiles of 8 rows
        "strips": Implementation(partial(_differentiable, _STRIPS, 1), strips.reasons),
        "xla": Implementation(flash_attention_reference),
    },
)

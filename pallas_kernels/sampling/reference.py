"""Plain truth for `sample`, and what XLA runs where the kernel cannot; noise and thresholds are the kernel's own.

Noise. A token with logit x scores `x / T - log(E)`, E exponentially distributed: x / T plus a Gumbel variable. E is a
hash of the row's two random words and of the column, so it need not be stored.

Thresholds. Floats that are not NaN are ordered like integers, their keys: a threshold is found by bisection of an
interval of keys, with the count or the mass of the tokens above its middle, and without sorting.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import launch
from pallas_kernels.numerics import LOG2E


def exponential(words: tuple[jax.Array, jax.Array], column: jax.Array) -> jax.Array:
    """Exponential noise, positive and finite, with mean `LOG2E`; all arguments uint32.

    With u uniform in (0, 1), `-log2(1 - u)`: the draw is decided by small values, which then are as fine as 2^-32.
    """
    hashed = column * jnp.uint32(0x9E3779B1) + words[0]
    hashed = (hashed ^ (hashed >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B) + words[1]
    hashed = (hashed ^ (hashed >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    hashed = (hashed ^ (hashed >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    hashed = hashed ^ (hashed >> jnp.uint32(15))
    u = jnp.minimum(hashed.astype(jnp.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    series = u * (LOG2E + u * (LOG2E / 2 + u * (LOG2E / 3 + u * (LOG2E / 4))))
    return jnp.where(u < 2.0**-5, series, -jnp.log2(1 - u))


def key_bits(dtype) -> int:
    """Width of a key."""
    return 16 if dtype == jnp.bfloat16 else 32


def key_range(bits: int) -> tuple[int, int]:
    """Keys of minus infinity and infinity."""
    infinity = 0x7F800000 >> (32 - bits)
    return -infinity - 1, infinity


def to_float(key: jax.Array, bits: int) -> jax.Array:
    """The float32 that has a key, int32."""
    magnitude = key ^ ((key >> 31) & (2 ** (bits - 1) - 1))
    return lax.bitcast_convert_type(magnitude << (32 - bits), jnp.float32)


def middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """`(low + high) // 2` without overflow."""
    return (low & high) + ((low ^ high) >> 1)


def is_open(low: jax.Array, high: jax.Array, above_low: jax.Array, above_high: jax.Array) -> jax.Array:
    """Whether more than one token lies in (low, high], and keys lie between."""
    return (low + 1 < high) & (above_low - above_high > 1)


def threshold(key: jax.Array, peak: jax.Array, scale: jax.Array, min_p: jax.Array | None, bits: int) -> jax.Array:
    """What a kept logit must exceed, from the key that top-k and top-p left and from min-p; all `[B]`."""
    bound = to_float(key, bits)
    if min_p is None:
        return bound
    return jnp.maximum(bound, jnp.nextafter(peak + jnp.log2(jnp.minimum(min_p, 1.0)) / scale, -jnp.inf))


def sample_reference(logits, words, scale, top_k, top_p, min_p):
    """`(token, logp)`; `words` uint32 `[B, 2]`, None for the most likely token; `scale` is `LOG2E / temperature`."""
    x = logits.astype(jnp.float32)
    clean = jnp.where(jnp.isnan(x), -jnp.inf, x)
    peak = jnp.maximum(clean.max(axis=1), jnp.finfo(jnp.float32).min)
    mass = jnp.exp2((x - peak[:, None]) * scale[:, None])
    score = clean
    if words is not None:
        column = lax.broadcasted_iota(jnp.uint32, x.shape, 1)
        score = clean * scale[:, None] - jnp.log2(exponential((words[:, :1], words[:, 1:]), column))
        if top_k or top_p is not None or min_p is not None:
            bits = key_bits(logits.dtype)
            key = search(clean, mass, top_k, top_p, bits)
            score = jnp.where(clean > threshold(key, peak, scale, min_p, bits)[:, None], score, -jnp.inf)
    token = _first_of_the_highest(score)
    drawn = jnp.take_along_axis(x, token[:, None], axis=1)[:, 0]
    return token, ((drawn - peak) * scale - jnp.log2(mass.sum(axis=1))) / LOG2E


def _first_of_the_highest(score: jax.Array) -> jax.Array:
    """`argmax(score, axis=1)` in two reductions, which a CPU does for several columns at once."""
    column = lax.broadcasted_iota(jnp.int32, score.shape, 1)
    last = score.shape[1] - 1
    return jnp.where(score == score.max(axis=1, keepdims=True), column, last).min(axis=1)


def search(x, mass, top_k, top_p, bits):
    """A key `[B]` that exactly the tokens kept by top-k and top-p exceed; `mass` is `exp((x - peak) / T)`."""
    start = [jnp.full(x.shape[:1], n) for n in (*key_range(bits), x.shape[1], 0)]
    low, high, count, none = launch.vary(start, launch.varying_axes(x))

    def above(key, weight):
        return jnp.sum(jnp.where(x > to_float(key, bits)[:, None], weight, 0), axis=1)

    def bisect(measure: Callable, wanted, low, high, count):
        def step(state):
            low, high, above_low, above_high = state
            key = middle(low, high)
            found, n = measure(key)
            unfinished = is_open(*state)
            fall, rise = unfinished & (found < wanted), unfinished & ~(found < wanted)
            low, above_low = jnp.where(rise, key, low), jnp.where(rise, n, above_low)
            return low, jnp.where(fall, key, high), above_low, jnp.where(fall, n, above_high)

        return lax.while_loop(lambda state: is_open(*state).any(), step, (low, high, count, none))[0]

    if top_k:
        low = bisect(lambda key: (above(key, 1),) * 2, top_k, low, high, count)
    if top_p is not None:
        wanted = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny) * above(low, mass)
        high = jnp.where(top_p < 1, high, low + 1)
        low = bisect(lambda key: (above(key, mass), above(key, 1)), wanted, low, high, above(low, 1))
    return low

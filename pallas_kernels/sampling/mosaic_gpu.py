"""Kernels of `sample`.

`sampling_forward` reads the logits once. A row is cut into splits of one warpgroup each, so that few rows fill the card
too. Every thread keeps the maximum, the mass relative to it and the best score of the tokens that it has seen; XLA
combines the splits. A step takes `LOADS` vectors: one correction of the mass serves all of them, and the loads overlap.

`sampling_threshold` finds what top-k and top-p keep by the bisection of `reference`: one block a row, whose warpgroups
share it and exchange count and mass through shared memory after every pass. A row of 128,256 logits does not fit shared
memory: the first pass reads device memory, the others L2.
"""

import dataclasses
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, launch
from pallas_kernels.numerics import LOG2E
from pallas_kernels.sampling.reference import (
    exponential,
    is_open,
    key_bits,
    key_range,
    middle,
    threshold,
    to_float,
)
from pallas_kernels.tuning import choice, config_for

DTYPES = (jnp.bfloat16, jnp.float32)
LANES = 128
LOADS = 4  # vectors of a warpgroup in flight
FINITE_LEAST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the draw is cut."""

    splits: int = choice(1, 2, 4, 8, 16, 32, 64)  # of a row


def heuristic(b: int, v: int) -> Config:
    """Four warpgroups a core, as many as its registers hold, if the rows are long enough for it."""
    wanted = max(1, min(4 * hopper.CORES // b, v // 4096))
    return Config(splits=min(64, 1 << (wanted.bit_length() - 1)))


@dataclasses.dataclass(frozen=True)
class ThresholdConfig:
    """How the search is cut."""

    warpgroups: int = choice(1, 2, 4, 8)  # of a row


def threshold_heuristic(b: int, v: int) -> ThresholdConfig:
    """As many as a core holds, shared by the rows that it has at a time, if each has something to do."""
    wanted = max(1, min(8 if b <= hopper.CORES else 4, v // 2048))
    return ThresholdConfig(warpgroups=1 << (wanted.bit_length() - 1))


def reasons(logits, words, scale, top_k, top_p, min_p) -> list[str]:
    """Why the kernels cannot serve a call."""
    found = []
    if logits.dtype not in DTYPES:
        found.append(f"dtype {logits.dtype}; accepted: bfloat16, float32")
    if logits.shape[1] < LANES:
        found.append(f"vocabulary of {logits.shape[1]}; accepted: {LANES} or more")
    return found


def sample_mosaic(logits, words, scale, top_k, top_p, min_p):
    """As `sample_reference`."""
    least = None
    if words is not None and (top_k or top_p is not None or min_p is not None):
        key, peak = sampling_threshold(logits, scale, top_k, top_p)
        least = threshold(key, peak, scale, min_p, key_bits(logits.dtype))
    peak, mass, score, column = sampling_forward(logits, words, scale, least)
    best = score == score.max(axis=1, keepdims=True)
    token = jnp.where(best, column, logits.shape[1] - 1).min(axis=1)
    highest = peak.max(axis=1)
    total = jnp.sum(mass * jnp.exp2((peak - highest[:, None]) * scale[:, None]), axis=1)
    drawn = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0].astype(jnp.float32)
    return token, ((drawn - highest) * scale - jnp.log2(total)) / LOG2E


def vector_size(v: int) -> int:
    """Logits of one load of a thread: 4 if rows are aligned to it. Eight of bfloat16 would take too many registers."""
    return next(n for n in (4, 2, 1) if v % n == 0 and LANES * n <= v)


class _Row:
    """Vectors of one row, dealt out to `workers` in steps of `loads`; what is left takes one more step, with -inf."""

    def __init__(self, ref, row, worker, workers: int, loads: int):
        self.ref, self.row, self.worker, self.workers = ref, row, worker, workers
        self.width = ref.shape[1]
        vector = vector_size(self.width)
        self.size = LANES * vector
        self.layout = plgpu.Layout.WG_STRIDED((self.size,), vec_size=vector)
        self.starts = [self.size * i for i in range(loads)]

    def local(self) -> jax.Array:
        """Position in a vector."""
        return plgpu.layout_cast(lax.iota(jnp.int32, self.size), self.layout)

    def full(self, value) -> jax.Array:
        """A vector of one value."""
        return plgpu.layout_cast(jnp.full((self.size,), value), self.layout)

    def fold(self, step, carry):
        """`step(carry, [(start, vector), ...])` over the worker's vectors; float32."""
        span = len(self.starts) * self.size
        steps, rest = divmod(self.width, span)

        def load(start):
            vector = plgpu.load(self.ref.at[self.row, pl.ds(start, self.size)], layout=self.layout)
            return vector.astype(jnp.float32)

        def whole(i, carry):
            first = (self.worker + i * self.workers) * span
            return step(carry, [(first + start, load(first + start)) for start in self.starts])

        mine = jnp.maximum(steps - self.worker + self.workers - 1, 0) // self.workers
        carry = lax.fori_loop(0, mine, whole, carry)
        if not rest:
            return carry

        def last(_, carry):
            """Vectors end with the row at the latest; what an earlier one has taken counts as minus infinity."""
            vectors = []
            for wanted in range(steps * span, self.width, self.size):
                start = min(wanted, self.width - self.size)
                vector = load(start)
                if start < wanted:
                    vector = jnp.where(self.local() >= wanted - start, vector, -jnp.inf)
                vectors.append((start, vector))
            return step(carry, vectors)

        owner = steps % self.workers
        return lax.fori_loop(0, (self.worker == owner).astype(jnp.int32), last, carry)


def sampling_forward(logits, words, scale, least):
    """`(peak, mass, score, column)` of each split, `[B, splits]`: largest logit, `sum(exp((x - peak) / T))`, best.

    Args:
      words: random, uint32 `[B, 2]`; None: the score is the logit.
      least: what a logit must exceed, `[B]`; None: nothing.
    """
    b, v = logits.shape
    splits = config_for("sampling_forward", heuristic(b, v), b=b, v=v, dtype=logits.dtype).splits

    def body(logits_ref, scale_ref, *rest):
        *optional, peak_ref, mass_ref, score_ref, column_ref = rest
        words_ref = None if words is None else optional.pop(0)
        least_ref = None if least is None else optional.pop(0)
        index, split = lax.axis_index("row"), lax.axis_index("split")
        row = _Row(logits_ref, index, split, splits, LOADS)
        scale = scale_ref[index]

        def step(carry, vectors):
            peak, mass, best, first = carry
            highest = peak
            for _, x in vectors:
                highest = jnp.where(x > highest, x, highest)
            mass *= jnp.exp2((peak - highest) * scale)
            for start, x in vectors:
                mass += jnp.exp2((x - highest) * scale)
                score = x
                if words_ref is not None:
                    column = (row.local() + start).astype(jnp.uint32)
                    score = x * scale - jnp.log2(exponential((words_ref[index, 0], words_ref[index, 1]), column))
                better = score > best
                if least_ref is not None:
                    better &= x > least_ref[index]
                best, first = jnp.where(better, score, best), jnp.where(better, start, first)
            return highest, mass, best, first

        start = row.full(FINITE_LEAST), row.full(0.0), row.full(-jnp.inf), row.full(0)
        peak, mass, best, first = row.fold(step, start)
        highest, top = jnp.max(peak), jnp.max(best)
        peak_ref[index, split] = highest
        mass_ref[index, split] = jnp.sum(mass * jnp.exp2((peak - highest) * scale))
        score_ref[index, split] = top
        column_ref[index, split] = jnp.min(jnp.where(best == top, first + row.local(), v - 1))

    parts = [jax.ShapeDtypeStruct((b, splits), dtype) for dtype in (jnp.float32,) * 3 + (jnp.int32,)]
    return launch.kernel(
        body,
        out_type=parts,
        grid=(b, splits),
        grid_names=("row", "split"),
        kernel_name="sampling_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(logits, scale, *(x for x in (words, least) if x is not None))


def sampling_threshold(logits, scale, top_k, top_p):
    """`(key, peak)`, both `[B]`: a key that exactly the tokens kept by top-k and top-p exceed, the largest logit."""
    b, v = logits.shape
    bits = key_bits(logits.dtype)
    smallest, infinity = key_range(bits)
    config = config_for("sampling_threshold", threshold_heuristic(b, v), b=b, v=v, dtype=logits.dtype, top_k=top_k > 0)
    workers = config.warpgroups

    def body(logits_ref, scale_ref, *rest):
        top_p_ref, key_ref, peak_ref, *scratch = (None, *rest) if top_p is None else rest
        index, worker = lax.axis_index("row"), lax.axis_index("worker")
        row = _Row(logits_ref, index, worker, workers, LOADS)
        scale = scale_ref[index]

        def together(combine, reduce_lanes, *vectors):
            """Reduces vectors over lanes and warpgroups. One warpgroup does so: all have the same scratch memory."""
            if workers == 1:
                return [reduce_lanes(vector) for vector in vectors]
            parts_ref, whole_ref, barrier = scratch
            for i, vector in enumerate(vectors):
                parts_ref[worker, i] = vector
            _meet(barrier)

            @pl.when(worker == 0)
            def _():
                for i in range(len(vectors)):
                    parts = [plgpu.load(parts_ref.at[w, i], layout=row.layout) for w in range(workers)]
                    whole_ref[i] = reduce_lanes(reduce(combine, parts))

            _meet(barrier)
            return [whole_ref[i] for i in range(len(vectors))]

        def highest(carry, vectors):
            for _, x in vectors:
                carry = jnp.where(x > carry, x, carry)
            return carry

        def above(key, peak):
            """Count of the logits above a key and, relative to a peak, their mass."""
            bound = to_float(row.full(key), bits)

            def step(carry, vectors):
                count, *mass = carry
                for _, x in vectors:
                    count += jnp.where(x > bound, 1.0, 0.0)
                    mass = [m + jnp.where(x > bound, jnp.exp2((x - peak) * scale), 0.0) for m in mass]
                return [count, *mass]

            return together(jnp.add, jnp.sum, *row.fold(step, [row.full(0.0)] * (1 if peak is None else 2)))

        def bisect(low, high, count, peak, wanted):
            def step(state):
                low, high, above_low, above_high = state
                key = middle(low, high)
                count, *mass = above(key, peak)
                few = (mass[0] if mass else count) < wanted
                low, above_low = jnp.where(few, low, key), jnp.where(few, above_low, count)
                return low, jnp.where(few, key, high), above_low, jnp.where(few, count, above_high)

            return lax.while_loop(lambda state: is_open(*state), step, (low, high, count, jnp.float32(0)))[0]

        (peak,) = together(jnp.maximum, jnp.max, row.fold(highest, row.full(FINITE_LEAST)))
        low, high = jnp.int32(smallest), jnp.int32(infinity)
        if top_k:
            low = bisect(low, high, jnp.float32(v), None, jnp.float32(top_k))
        if top_p_ref is not None:
            count, mass = above(low, peak)
            wanted = jnp.maximum(top_p_ref[index], jnp.finfo(jnp.float32).tiny) * mass
            low = bisect(low, jnp.where(top_p_ref[index] < 1, high, low + 1), count, peak, wanted)

        @pl.when(worker == 0)
        def _():
            key_ref[index], peak_ref[index] = low, peak

    parts, whole = plgpu.SMEM((workers, 2, LANES * vector_size(v)), jnp.float32), plgpu.SMEM((2,), jnp.float32)
    return launch.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((b,), jnp.int32), jax.ShapeDtypeStruct((b,), jnp.float32)],
        grid=(b,),
        grid_names=("row",),
        num_threads=workers,
        thread_name="worker",
        scratch_types=[parts, whole, plgpu.Barrier(num_arrivals=workers)] if workers > 1 else [],
        kernel_name="sampling_threshold",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(logits, scale, *(() if top_p is None else (top_p,)))


def _meet(barrier) -> None:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)

"""Calls of `sample` in real models."""

from functools import partial

import jax.numpy as jnp

from pallas_kernels.sampling.api import sample
from pallas_kernels.sampling.mosaic_gpu import heuristic
from pallas_kernels.sampling.reference import key_bits
from pallas_kernels.shape_specs import MODELS, Call, Cost, nbytes, shape

ROWS = {"135m": 256, "1b": 128, "8b": 64, "70b": 32}  # of a rollout; a large model leaves room for few


def calls(model: str) -> list[Call]:
    """A step of a rollout, from the whole distribution and from a truncated one."""
    logits, key = shape(ROWS[model], MODELS[model].vocabulary, dtype=jnp.float32), shape(2, dtype=jnp.uint32)
    parts = 4 * 4 * logits.shape[0] * heuristic(*logits.shape).splits
    forward = {"sampling_forward": Cost(0, nbytes(logits), nbytes(logits) + parts)}
    # One pass for the peak, one for what top-k keeps, and one for each bit of a key and threshold at most; all but the
    # first from L2, which holds the row of each block that runs: 132 x 513 KB are more than 50 MB, 64 are not.
    passes = 2 + 2 * key_bits(logits.dtype)
    search = {"sampling_threshold": Cost(0, nbytes(logits), passes * nbytes(logits))}
    return [
        Call(f"draw, {model}", partial(sample, temperature=0.8), (logits, key), forward),
        Call(
            f"truncated draw, {model}",
            partial(sample, temperature=0.8, top_k=50, top_p=0.95, min_p=0.02),
            (logits, key),
            forward | search,
        ),
    ]

"""Calls of `linear_logprob` in real models."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import cdiv

from pallas_kernels.linear_logprob.api import linear_logprob
from pallas_kernels.linear_logprob.mosaic_gpu import ROWS, Config, heuristic
from pallas_kernels.linear_logprob.mosaic_gpu_vjp import columns_held
from pallas_kernels.shape_specs import BATCH, LENGTH, MODELS, RESPONSE, Call, Cost, forward_and_backward, nbytes, shape


def calls(model: str) -> list[Call]:
    """Response tokens of a training step, and the scoring of whole sequences."""
    width, v = MODELS[model].width, MODELS[model].vocabulary
    head = shape(v, width)

    def inputs(m):
        return shape(m, width), head, shape(m, dtype=jnp.int32)

    def forward(m):
        config, (hidden, _, targets) = heuristic(m, v), inputs(m)
        parts = 4 * config.splits * nbytes(targets)
        least = nbytes(hidden, head, targets) + parts
        return Cost(2 * m * width * v, least, _tile_bytes(m, width, v, config) + parts)

    def backward(m):
        """Of all slices together: each reads the hidden states again, and five numbers a row."""
        columns, (hidden, _, targets) = columns_held(None, m, v), inputs(m)
        slices, gradient = cdiv(v, columns), nbytes(shape(m, v))
        least = slices * nbytes(hidden, *[targets] * 5) + nbytes(head) + gradient
        tiles = _tile_bytes(m, width, columns, heuristic(m, columns))
        return Cost(2 * m * width * v, least, slices * (tiles + 5 * nbytes(targets)) + gradient)

    def draw_for(m):
        def draw(key):
            """Logits of unit variance, targets from all of the vocabulary."""
            hidden_key, head_key, key = jax.random.split(key, 3)
            hidden = jax.random.normal(hidden_key, (m, width), head.dtype)
            rows = jax.random.normal(head_key, head.shape, head.dtype) * jnp.asarray(width**-0.5, head.dtype)
            return hidden, rows, jax.random.randint(key, (m,), 0, v)

        return draw

    trained, scored = BATCH * RESPONSE, BATCH * LENGTH
    return [
        Call(
            f"trained head, {model}",
            forward_and_backward(linear_logprob, 0, 1),
            inputs(trained),
            {"linear_logprob_forward": forward(trained), "linear_logprob_backward": backward(trained)},
            draw_for(trained),
        ),
        Call(
            f"scoring, {model}",
            linear_logprob,
            inputs(scored),
            {"linear_logprob_forward": forward(scored)},
            draw_for(scored),
        ),
    ]


def _tile_bytes(m: int, width: int, vocabulary: int, config: Config) -> int:
    """Operands of all tiles."""
    tiles = cdiv(m, ROWS) * cdiv(vocabulary, config.columns)
    return tiles * (ROWS + config.columns) * 2 * width

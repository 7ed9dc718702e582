"""Calls of `quantized_matmul` in real models."""

from functools import partial

import jax

from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.formats import quantize
from pallas_kernels.quantized_matmul.mosaic_gpu import ROWS, heuristic
from pallas_kernels.shape_specs import BATCH, LENGTH, MODELS, Call, Cost, forward_and_backward, nbytes, shape

ROLLOUT = 16  # sequences that are generated together


def calls(model: str) -> list[Call]:
    """The projection up in the MLP, in a step of rollouts and in training; int4 runs the kernel of NF4."""
    return [
        _call(f"rollout, int8, {model}", model, ROLLOUT, "int8"),
        _call(f"rollout, nf4, {model}", model, ROLLOUT, "nf4"),
        _call(f"training, nf4, {model}", model, BATCH * LENGTH, "nf4", trained=True),
    ]


def _call(name: str, model: str, m: int, format: str, trained: bool = False) -> Call:
    k, n = MODELS[model].width, MODELS[model].ffn
    x = shape(m, k)
    weights, structure = jax.tree.flatten(jax.eval_shape(partial(quantize, format=format), shape(n, k)))
    config = heuristic(m, n, k, format)
    once = nbytes(x, *weights, shape(m, n))
    partial_sums = 8 * config.splits * m * n if config.splits > 1 else 0
    moved = (
        nbytes(*weights) * -(-m // config.tile_m)
        + nbytes(x) * (n // (ROWS * config.warpgroups))
        + nbytes(shape(m, n))
        + partial_sums
    )

    def function(x: jax.Array, *leaves: jax.Array) -> jax.Array:
        return quantized_matmul(x, jax.tree.unflatten(structure, leaves))

    def draw(key):
        x_key, w_key = jax.random.split(key)
        w = quantize(jax.random.normal(w_key, (n, k)), format)
        return jax.random.normal(x_key, x.shape, x.dtype), *jax.tree.leaves(w)

    return Call(
        name,
        forward_and_backward(function, 0) if trained else function,
        (x, *weights),
        {"quantized_matmul_forward": Cost(2 * m * n * k, once, moved)},
        draw,
    )

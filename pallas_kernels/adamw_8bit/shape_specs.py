"""Calls of `adamw_8bit` in real models."""

import jax
import jax.numpy as jnp

from pallas_kernels.adamw_8bit.api import Moments, adamw_8bit, init_moments
from pallas_kernels.shape_specs import MODELS, Call, Cost, nbytes, shape


def calls(model: str) -> list[Call]:
    """The largest matrix of a layer, kept in bfloat16 with stochastic rounding, and the same in float32."""
    sizes = MODELS[model].width, MODELS[model].ffn
    return [_call(f"bfloat16, {model}", shape(*sizes)), _call(f"float32, {model}", shape(*sizes, dtype=jnp.float32))]


def _call(name: str, param: jax.ShapeDtypeStruct) -> Call:
    moments = jax.eval_shape(init_moments, param)
    least = nbytes(param) + 2 * nbytes(param, *moments)
    costs = {"adamw_8bit_step": Cost(0, least, least)}

    def draw(key):
        """As some steps leave the moments."""
        keys = jax.random.split(key, 4)
        p, g, earlier = (jax.random.normal(key, param.shape, param.dtype) for key in keys[:3])
        return p, g, *adamw_8bit(p, earlier, init_moments(p), step=1, learning_rate=0.0, implementation="xla")[1]

    return Call(name, _step, (param, param, *moments), costs, draw)


def _step(param, grad, *moments):
    return adamw_8bit(param, grad, Moments(*moments), step=10, learning_rate=1e-4, key=jax.random.key(0))

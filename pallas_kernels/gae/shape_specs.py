"""Calls of `gae` in real models."""

from functools import partial

import jax.numpy as jnp

from pallas_kernels.gae.api import gae
from pallas_kernels.shape_specs import RESPONSE, Call, Cost, nbytes, shape

ROWS = {"135m": 1024, "1b": 512, "8b": 256, "70b": 128}  # responses of an iteration


def calls(model: str) -> list[Call]:
    """The advantages of one iteration of PPO."""
    of_token = shape(ROWS[model], RESPONSE, dtype=jnp.float32)
    mask = shape(ROWS[model], RESPONSE, dtype=jnp.bool)
    moved = 3 * nbytes(of_token) + nbytes(mask)
    function = partial(gae, gamma=0.99, lam=0.95)
    return [Call(f"gae, {model}", function, (of_token, of_token, mask), {"gae_forward": Cost(0, moved, moved)})]

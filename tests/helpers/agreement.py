"""A kernel in the simulator against its reference in float32, results and gradients."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import hopper
from pallas_kernels.shape_specs import partial_vjp
from tests.helpers.tolerances import KERNEL


def assert_agrees(
    name: str, function: Callable[..., Any], args: tuple, differentiable: tuple[int, ...] = (), seed: int = 0
) -> None:
    """Compares `function(*args, implementation=...)` of the simulated kernel with the reference on upcast arguments.

    Gradients are taken with random cotangents, the same for both. The simulator looks for races.
    """
    with hopper.simulated():
        found = _evaluate(partial(function, implementation="mosaic_gpu"), args, differentiable, seed)
    wanted = _evaluate(partial(function, implementation="xla"), jax.tree.map(_upcast, args), differentiable, seed)
    dtype = next(x.dtype for x in jax.tree.leaves(args) if jnp.issubdtype(x.dtype, jnp.floating))
    assert_close(found, wanted, KERNEL[name][str(dtype)])


def assert_close(found: Any, wanted: Any, tolerance: float) -> None:
    """Each array within `tolerance` times the largest finite value of what is wanted; infinities in the same places."""
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, want), got in zip(paths, jax.tree.leaves(found), strict=True):
        want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
        where = f"at {jax.tree_util.keystr(path)}"
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=where)
        if finite.any():
            atol = tolerance * max(np.abs(want[finite]).max(), 1e-30)
            np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=atol, err_msg=where)


def device_of(implementation: str) -> contextlib.AbstractContextManager[None]:
    """The simulated GPU, if a kernel is to run."""
    return hopper.simulated() if implementation == "mosaic_gpu" else contextlib.nullcontext()


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32, scale: float = 1.0) -> jax.Array:
    """Normal numbers."""
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def _evaluate(function, args, differentiable, seed):
    out, pull = partial_vjp(function, args, differentiable)
    if not differentiable:
        return out
    leaves, treedef = jax.tree.flatten(out)
    keys = jax.random.split(jax.random.key(1000 + seed), len(leaves))
    # Rounded to bfloat16, so that they are the same for every dtype.
    cotangents = [
        jax.random.normal(k, x.shape).astype(jnp.bfloat16).astype(x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    return out, pull(jax.tree.unflatten(treedef, cotangents))


def _upcast(x):
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

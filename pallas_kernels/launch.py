"""Starting kernels, also inside a `shard_map` that keeps account of what differs from device to device."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core as jax_core


def kernel(body: Callable, **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel` for arrays that differ over the axes of a `shard_map`: its results differ over the same axes."""
    call = plgpu.kernel(body, **options)

    def run(*operands: jax.Array) -> Any:
        if not (axes := varying_axes(operands)):
            return call(*operands)
        # Traced as if nothing differed: a loop inside the kernel may carry what does and what does not.
        plain = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
        traced, shapes = jax.make_jaxpr(call, return_shape=True)(*plain)
        results = jax_core.jaxpr_as_fun(traced)(*operands)
        return vary(jax.tree.unflatten(jax.tree.structure(shapes), results), axes)

    return run


def varying_axes(*trees: Any) -> tuple[str, ...]:
    """Mesh axes of a surrounding `shard_map` over which any of the arrays differs from device to device."""
    kinds = (jax.typeof(x).manual_axis_type for x in jax.tree.leaves(trees) if isinstance(x, jax.Array))
    return tuple(sorted(frozenset[str]().union(*(kind.varying for kind in kinds))))


def vary(tree: Any, axes: tuple[str, ...]) -> Any:
    """Declares the arrays of `tree` to differ over `axes`; with gradients, the sum over devices is taken here."""

    def cast(x: Any) -> Any:
        missing = tuple(a for a in axes if a not in varying_axes(x)) if isinstance(x, jax.Array) else ()
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)

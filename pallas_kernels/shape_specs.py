"""Shapes of real models, shared by tests, tuner and benchmarks, and hand counts of what a kernel must do there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hopper


class Model(NamedTuple):
    """Sizes that fix the shapes of a decoder's operations."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int


MODELS = {
    "135m": Model(576, 9, 3, 64, 1536, 49152),  # SmolLM2
    "1b": Model(2048, 32, 8, 64, 8192, 128256),  # Llama 3.2
    "8b": Model(4096, 32, 8, 128, 14336, 128256),  # Llama 3
    "70b": Model(8192, 64, 8, 128, 28672, 128256),  # Llama 3
}
BATCH, PROMPT, RESPONSE = 8, 512, 512  # of one micro-batch of PPO
LENGTH = PROMPT + RESPONSE


class Cost(NamedTuple):
    """What one kernel does, counted by hand."""

    flops: float  # of matrix products; 0 where a kernel has none
    least_bytes: float  # every input read once, every output written once
    moved_bytes: float  # what the kernel's tiles read and write, as if no cache helped

    @property
    def floor(self) -> float:
        """Seconds below which no kernel can come on an H100."""
        return max(self.flops / hopper.BF16_RATE, self.least_bytes / hopper.BANDWIDTH)


class Call(NamedTuple):
    """A call of an operation, forward and, where it has one, backward."""

    name: str
    function: Callable[..., Any]  # of arrays alone
    args: tuple[jax.ShapeDtypeStruct, ...]
    costs: dict[str, Cost]  # by the name of each kernel that must run
    draw: Callable[[jax.Array], tuple] | None = None  # arguments from a key, where not any numbers will do


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """Short for `jax.ShapeDtypeStruct`."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def nbytes(*arrays: jax.ShapeDtypeStruct) -> int:
    """Bytes of arrays together."""
    return sum(a.size * a.dtype.itemsize for a in arrays)


def partial_vjp(function: Callable[..., Any], args: tuple, differentiable: tuple[int, ...]) -> tuple[Any, Callable]:
    """`jax.vjp` of a function with respect to some of its arguments."""

    def of(*chosen: Any) -> Any:
        full = list(args)
        for i, x in zip(differentiable, chosen, strict=True):
            full[i] = x
        return function(*full)

    return jax.vjp(of, *(args[i] for i in differentiable))


def forward_and_backward(function: Callable[..., Any], *differentiable: int) -> Callable[..., Any]:
    """A function of the same arguments that returns results and gradients, the results being the cotangents too."""

    def both(*args: Any) -> Any:
        out, pull = partial_vjp(function, args, differentiable)
        return out, pull(out)

    return both


def random_arguments(call: Call, seed: int = 0) -> tuple[jax.Array, ...]:
    """Arrays for a call: by its own `draw`, else normal floats, and integers that are 0 or 1."""
    if call.draw is not None:
        return tuple(jax.jit(call.draw)(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed), len(call.args))
    return tuple(
        jax.random.normal(key, a.shape, a.dtype)
        if jnp.issubdtype(a.dtype, jnp.floating)
        else jax.random.randint(key, a.shape, 0, 2).astype(a.dtype)
        for key, a in zip(keys, call.args, strict=True)
    )

"""Products of activations with weights, in the forms that XLA's compilers do well."""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import hopper

FEW_ROWS = 128  # with more, the order of the operands makes no difference on two AVX2 cores


def matmul(x: Float[Array, "*M in"], kernel: Float[Array, "in out"]) -> Float[Array, "*M out"]:
    """`x @ kernel` as a product of two matrices: XLA's CPU compiler would turn a batch of rows around, element by
    element, for the gradient of the kernel.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def matmul_transposed(
    x: Float[Array, "*M in"], weights: Float[Array, "out in"], dtype: DTypeLike | None = None
) -> Float[Array, "*M out"]:
    """`x @ weights.T`, accumulated in `dtype`.

    On a CPU, a product of few rows is one of many with few columns: as the right operand, XLA would copy all weights
    into another order every time. The first barrier keeps it from turning the product around again. The second keeps
    the order of the columns from what is computed of them: products of inputs in that order XLA would do in float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    both_last = ((1,), (1,)), ((), ())
    if hopper.device_kind() == "cpu" and len(rows) <= FEW_ROWS:
        columns = jax.lax.dot_general(weights, rows, both_last, preferred_element_type=dtype)
        y = jax.lax.optimization_barrier(jax.lax.optimization_barrier(columns).T[:, None])
    else:
        y = jax.lax.dot_general(rows, weights, both_last, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], len(weights))

"""Matrix product with weights of 8 or 4 bits."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, Operation, hopper_kernel
from pallas_kernels.quantized_matmul import mosaic_gpu
from pallas_kernels.quantized_matmul.formats import Quantized
from pallas_kernels.quantized_matmul.reference import input_gradient, quantized_matmul_reference


def quantized_matmul(
    x: Float[Array, "*M K"], w: Quantized, *, implementation: str | None = None
) -> Float[Array, "*M N"]:
    """`x @ dequantize(w).T` with float32 accumulation, in the dtype of `x`.

    Equivalent to

        einsum("...k,nk->...n", x, dequantize(w, x.dtype), preferred_element_type=float32).astype(x.dtype)

    but for the rounding of weights, of which the kernel rounds codebook, scale and their product each to the dtype of
    `x`, and int8 not at all.

    Args:
      x: inputs, bfloat16, float16 or float32.
      w: one matrix [N, K] from `quantize`; of a stack, a slice.
      implementation: "mosaic_gpu", "xla", or None for the first of them that can serve the call.

    Gradients flow to `x` alone: `dy @ dequantize(w, dy.dtype)`. Those of `w` are zero.

    Raises:
      ValueError: shapes or dtypes that do not belong together, an unknown implementation.
      NotImplementedError: the named implementation cannot serve the call; all reasons.

    Reference: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023.
    """
    if len(w.shape) != 2:
        raise ValueError(f"w {w.shape} is not one matrix [N, K]; slice or scan its leading axes")
    if x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x {x.shape} and w {w.shape} do not fit [*M, K], [N, K]")
    y = OPERATION(implementation, x.reshape(-1, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], w.shape[0])


def _differentiable(forward: Callable[[jax.Array, Quantized], jax.Array]) -> Callable[..., jax.Array]:
    matmul = jax.custom_vjp(forward)
    matmul.defvjp(lambda x, w: (forward(x, w), w), lambda w, dy: (input_gradient(dy, w), None))
    return matmul


OPERATION = Operation(
    "quantized_matmul",
    {
        "mosaic_gpu": hopper_kernel(_differentiable(mosaic_gpu.quantized_matmul_forward), mosaic_gpu.reasons),
        "xla": Implementation(_differentiable(quantized_matmul_reference)),
    },
)

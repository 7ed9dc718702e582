"""Log-probability and entropy of a linear head, without the logits of all positions at once."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, Operation, hopper_kernel
from pallas_kernels.linear_logprob import chunked, mosaic_gpu, mosaic_gpu_vjp
from pallas_kernels.linear_logprob.reference import linear_logprob_reference


class LogProbs(NamedTuple):
    """All in nats, float32."""

    logp: Float[Array, "*M"]  # of the targets
    entropy: Float[Array, "*M"]  # of the distribution
    lse: Float[Array, "*M"]  # log of the sum of e^logit


def linear_logprob(
    hidden: Float[Array, "*M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*M"],
    *,
    temperature: Float[Array, ""] | float = 1.0,
    soft_cap: float | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> LogProbs:
    """Log-probability of `targets` and entropy of `softmax(hidden @ head.T / temperature)`.

    Equivalent to

        logits = einsum("md,vd->mv", hidden, head, preferred_element_type=float32)
        logits = logits if soft_cap is None else soft_cap * tanh(logits / soft_cap)
        lse = logsumexp(logits / temperature, -1)
        logps = logits / temperature - lse[..., None]
        logp = take_along_axis(logps, targets[..., None], -1)[..., 0]
        entropy = -(exp(logps) * logps).sum(-1)

    without ever holding `[M, V]` numbers, in the forward pass or in the backward pass, unless by "reference".

    Args:
      hidden: hidden states, any float dtype; products are accumulated in float32.
      head: rows of the output head, one a vocabulary entry (the layout of checkpoints and of tied embeddings).
      targets: token ids in `[0, V)`.
      temperature: divides the logits; a positive number, traced or not.
      soft_cap: bound of the logits' size; Gemma 2 has one.
      chunk: columns of the vocabulary held at a time; None for as many as fill 16 MiB, or 64 MiB by the kernel.
      implementation: "mosaic_gpu", "chunked", "reference", or None for the first of them that can serve the call.

    Returns:
      `(logp, entropy, lse)`, in nats.

    Gradients flow to `hidden` and `head`, from all results, and not to `temperature`. That of a head that is not
    differentiated is not computed.

    Raises:
      ValueError: shapes that do not belong together, an unknown implementation.
      NotImplementedError: the named implementation cannot serve the call; all reasons.

    Reference: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.
    """
    if hidden.ndim < 1 or hidden.shape[:-1] != targets.shape or head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden {hidden.shape}, head {head.shape} and targets {targets.shape} do not fit [*M, D], [V, D], [*M]"
        )
    rows, temperature = hidden.reshape(-1, hidden.shape[-1]), lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    results = OPERATION(implementation, rows, head, targets.reshape(-1), temperature, chunk, soft_cap)
    return LogProbs(*(x.reshape(targets.shape) for x in results))


def _differentiable(forward: Callable, backward: Callable) -> Callable:
    """A forward pass with its backward pass, which learns whether the head is differentiated."""

    @partial(jax.custom_vjp, nondiff_argnums=(4, 5))
    def run(hidden, head, targets, temperature, chunk, soft_cap):
        return forward(hidden, head, targets, temperature, chunk, soft_cap)

    def keep(hidden, head, targets, temperature, chunk, soft_cap):
        inputs = hidden.value, head.value, targets.value, temperature.value
        results = forward(*inputs, chunk, soft_cap)
        frozen = None if head.perturbed else ()  # not a bool: it must be part of the residuals' structure
        return results, (inputs, results, frozen)

    def pull(chunk, soft_cap, residuals, cotangents):
        inputs, results, frozen = residuals
        cotangents = [jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c for c in cotangents]
        gradients = backward(*inputs, results, cotangents, chunk, soft_cap, frozen=frozen is not None)
        return *gradients, None, None

    run.defvjp(keep, pull, symbolic_zeros=True)
    return run


OPERATION = Operation(
    "linear_logprob",
    {
        "mosaic_gpu": hopper_kernel(
            _differentiable(mosaic_gpu.linear_logprob_forward, mosaic_gpu_vjp.linear_logprob_backward),
            mosaic_gpu.reasons,
        ),
        "chunked": Implementation(_differentiable(chunked.linear_logprob_forward, chunked.linear_logprob_backward)),
        "reference": Implementation(linear_logprob_reference),
    },
)

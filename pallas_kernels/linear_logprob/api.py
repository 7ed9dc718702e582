"""Log-probability and entropy of a linear head, without the logits of all positions at once."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_logprob.chunked import linear_logprob_chunked

CHUNK = 8192  # columns of the vocabulary at a time; 24 MiB of float32 logits for 768 positions


class LogProbs(NamedTuple):
    """Both in nats, float32."""

    logp: Float[Array, "*M"]
    entropy: Float[Array, "*M"]


def linear_logprob(
    hidden: Float[Array, "*M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*M"],
    *,
    temperature: Float[Array, ""] | float = 1.0,
    soft_cap: float | None = None,
    chunk: int = CHUNK,
) -> LogProbs:
    """Log-probability of `targets` and entropy of `softmax(hidden @ head.T / temperature)`.

    Equivalent to

        logps = jax.nn.log_softmax(hidden @ head.T / temperature)
        logp = jnp.take_along_axis(logps, targets[..., None], -1)[..., 0]
        entropy = -(jnp.exp(logps) * logps).sum(-1)

    with the logits bounded by `soft_cap * tanh(logits / soft_cap)` before the division if there is a soft cap. It never
    holds more than `[M, chunk]` logits, in the forward pass or in the backward pass.

    Args:
      hidden: hidden states, any float dtype; products are accumulated in float32.
      head: rows of the output head, one a vocabulary entry (the layout of checkpoints and of tied embeddings).
      targets: token ids in `[0, V)`.
      temperature: divides the logits; a positive number, traced or not.
      soft_cap: bound of the logits' size; Gemma 2 has one.
      chunk: columns of the vocabulary computed at a time.

    Gradients flow to `hidden` and `head`, from both results, and not to `temperature`.

    Raises:
      ValueError: shapes that do not belong together.
    """
    if hidden.ndim < 1 or hidden.shape[:-1] != targets.shape or head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden {hidden.shape}, head {head.shape} and targets {targets.shape} do not fit [*M, D], [V, D], [*M]"
        )
    logp, entropy = linear_logprob_chunked(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        targets.reshape(-1),
        jnp.asarray(temperature, jnp.float32),
        min(chunk, head.shape[0]),
        soft_cap,
    )
    return LogProbs(logp.reshape(targets.shape), entropy.reshape(targets.shape))

"""One token a row from logits, truncated or not, with its log-probability."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, Operation, hopper_kernel
from pallas_kernels.numerics import LOG2E
from pallas_kernels.sampling import mosaic_gpu
from pallas_kernels.sampling.reference import sample_reference


class Sample(NamedTuple):
    """What was drawn."""

    token: Int[Array, " B"]  # int32
    logp: Float[Array, " B"]  # nats, float32


def sample(
    logits: Float[Array, "B V"],
    key: Array | None,
    *,
    temperature: Float[Array, " B"] | Float[Array, ""] | float = 1.0,
    top_k: int = 0,
    top_p: Float[Array, " B"] | Float[Array, ""] | float = 1.0,
    min_p: Float[Array, " B"] | Float[Array, ""] | float = 0.0,
    greedy: bool = False,
    implementation: str | None = None,
) -> Sample:
    """Draws one token a row from `softmax(logits / temperature)`, truncated; `logp` is that of the whole distribution.

    Equivalent, for one row, to

        p = softmax(logits / temperature)
        more = logits[None, :] > logits[:, None]                                  # [V, V]: is more likely than
        keep = more.sum(1) < top_k                                                # all of them with top_k = 0
        keep &= (more * p * keep).sum(1) < top_p * (p * keep).sum()
        keep &= p >= min_p * p.max()
        token = argmax(where(keep, log(p) + gumbel(key), -inf))                   # argmax(logits) if greedy
        logp = log(p)[token]

    Tokens that are equally likely are kept or dropped together, and the most likely ones are always kept. Neither noise
    nor a sorted copy of the logits is stored. All implementations draw the same token from the same key, but for
    rounding where two tokens score alike to the last bits.

    Args:
      logits: bfloat16 or wider, computed with in float32. Minus infinity is never drawn. Neither is NaN, but it makes
        the row's `logp` NaN. Of a row without any other logit the token is 0 and `logp` NaN.
      key: random key; None is accepted for greedy draws.
      temperature: positive; one number or one a row, traced or not. As top_p and min_p.
      top_k: keep the k most likely tokens and those as likely as the last of them; 0 keeps all.
      top_p: then keep the most likely tokens whose probability, out of what top_k kept, first reaches top_p, in (0, 1].
        A Python 1.0 costs nothing; a traced one costs the search.
      min_p: then keep what is at least min_p times as likely as the most likely token, in [0, 1].
      greedy: take the most likely token, of equal ones the first, instead of drawing.
      implementation: "mosaic_gpu", "xla", or None for the first of them that can serve the call.

    No gradient flows.

    Raises:
      ValueError: a shape or number that is not accepted, an unknown implementation.
      NotImplementedError: the named implementation cannot serve the call; all reasons.

    References:
      Maddison et al., A* Sampling, 2014 (Gumbel-max); Fan et al., Hierarchical Neural Story Generation, 2018 (top-k);
      Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (top-p); Nguyen et al., Turning Up the Heat:
      Min-p Sampling for Creative and Coherent LLM Outputs, 2025.
    """
    if logits.ndim != 2 or 0 in logits.shape or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits {logits.dtype}{logits.shape} are not floats [B, V]")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}; accepted: 0 (off) or more")
    b, v = logits.shape
    words = None
    if not greedy:
        if key is None:
            raise ValueError("key=None; only greedy draws need none")
        words = jax.random.bits(key, (b, 2), jnp.uint32)
    scale = LOG2E / _per_row("temperature", temperature, b, lambda x: x > 0, "above 0")
    p = _per_row("top_p", top_p, b, lambda x: 0 < x <= 1, "above 0, up to 1")
    least = _per_row("min_p", min_p, b, lambda x: 0 <= x <= 1, "0 to 1")
    return Sample(
        *OPERATION(
            implementation,
            jax.lax.stop_gradient(logits),
            words,
            scale,
            top_k if top_k < v else 0,
            None if isinstance(top_p, float | int) and top_p == 1 else p,
            None if isinstance(min_p, float | int) and min_p == 0 else least,
        )
    )


def _per_row(name, value, rows, valid, accepted):
    if isinstance(value, float | int) and not valid(value):
        raise ValueError(f"{name}={value}; accepted: {accepted}")
    value = jax.lax.stop_gradient(jnp.asarray(value, jnp.float32))
    if value.shape not in ((), (rows,)):
        raise ValueError(f"{name} {value.shape} is neither one number nor one a row, [{rows}]")
    return jnp.broadcast_to(value, (rows,))


OPERATION = Operation(
    "sampling",
    {
        "mosaic_gpu": hopper_kernel(mosaic_gpu.sample_mosaic, mosaic_gpu.reasons),
        "xla": Implementation(sample_reference),
    },
)

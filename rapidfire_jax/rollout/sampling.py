"""Drawing one token a row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def draw(
    key: Array, logits: Float[Array, "B V"], *, top_k: int = 0, top_p: float = 1.0, greedy: bool = False
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws a token from each row; returns it with its log-probability under the *whole* distribution.

    The log-probability is that of `softmax(logits)` before top-k and top-p: training computes the same quantity, so
    ratios start at 1 whatever the truncation.

    Args:
      logits: already divided by the temperature, float32.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: then keep the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2020).
      greedy: take the most likely token instead of drawing.
    """
    logps = jax.nn.log_softmax(logits, axis=-1)
    if greedy:
        token = jnp.argmax(logits, axis=-1)
    else:
        kept = logps
        if 0 < top_k < logits.shape[-1]:
            kept = jnp.where(kept >= jax.lax.top_k(kept, top_k)[0][:, -1:], kept, -jnp.inf)
        if top_p < 1.0:
            kept = _nucleus(kept, top_p)
        token = jax.random.categorical(key, kept, axis=-1)
    return token.astype(jnp.int32), jnp.take_along_axis(logps, token[:, None], axis=1)[:, 0]


def _nucleus(logps: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    descending = -jnp.sort(-logps, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    threshold = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logps >= threshold, logps, -jnp.inf)

"""Plain truth for `linear_logprob`: writes the whole `[M, V]` logits."""

import jax
import jax.numpy as jnp


def linear_logprob_reference(hidden, head, targets, temperature, soft_cap=None):
    """Returns `(logp [M], entropy [M])` in float32."""
    logits = jnp.einsum("md,vd->mv", hidden, head, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = jnp.tanh(logits / soft_cap) * soft_cap
    logps = jax.nn.log_softmax(logits / temperature, axis=-1)
    logp = jnp.take_along_axis(logps, targets[:, None], axis=1)[:, 0]
    return logp, -jnp.sum(jnp.exp(logps) * logps, axis=-1)

"""Plain truth for `linear_logprob`: writes the whole `[M, V]` logits."""

import jax
import jax.numpy as jnp


def linear_logprob_reference(hidden, head, targets, temperature, chunk=None, soft_cap=None):
    """`(logp [M], entropy [M], lse [M])` in float32; there are no slices for `chunk` to cut."""
    logits = jnp.einsum("md,vd->mv", hidden, head, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = jnp.tanh(logits / soft_cap) * soft_cap
    logits = logits / temperature
    lse = jax.nn.logsumexp(logits, axis=-1)
    logps = logits - lse[:, None]
    logp = jnp.take_along_axis(logps, targets[:, None], axis=1)[:, 0]
    return logp, -jnp.sum(jnp.exp(logps) * logps, axis=-1), lse

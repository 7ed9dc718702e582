"""`linear_logprob` in slices of the vocabulary, forward and backward: `[M, chunk]` is the largest array.

The forward pass keeps a running maximum and two running sums (the online softmax of Milakov and Gimelshein 2018); the
backward pass computes each slice of the logits again.
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def linear_logprob_chunked(hidden, head, targets, temperature, chunk, soft_cap):
    """Returns `(logp [M], entropy [M])` in float32. No gradient flows to `temperature`."""
    return _forward(hidden, head, targets, temperature, chunk, soft_cap)[0]


def _slices(head, chunk):
    """Start of each slice and the columns it owns: the last slice is moved back to fit and leaves out what was done."""
    vocabulary = head.shape[0]
    nominal = jnp.arange(0, vocabulary, chunk)
    starts = jnp.minimum(nominal, vocabulary - chunk)
    return starts, nominal - starts


def _logits(hidden, rows, soft_cap):
    return _capped(jnp.einsum("md,vd->mv", hidden, rows, preferred_element_type=jnp.float32), soft_cap)


def _capped(z, soft_cap):
    return z if soft_cap is None else jnp.tanh(z / soft_cap) * soft_cap


def _forward(hidden, head, targets, temperature, chunk, soft_cap):
    def step(carry, piece):
        peak, total, weighted = carry
        start, skip = piece
        z = _logits(hidden, jax.lax.dynamic_slice_in_dim(head, start, chunk), soft_cap) / temperature
        z = jnp.where(jnp.arange(chunk)[None] >= skip, z, -jnp.inf)
        new_peak = jnp.maximum(peak, z.max(axis=1))
        shrink, e = jnp.exp(peak - new_peak), jnp.exp(z - new_peak[:, None])
        total = total * shrink + e.sum(axis=1)
        weighted = weighted * shrink + jnp.where(e > 0, e * z, 0.0).sum(axis=1)
        return (new_peak, total, weighted), None

    rows = hidden.shape[0]
    carry = (jnp.full((rows,), -jnp.inf), jnp.zeros((rows,)), jnp.zeros((rows,)))
    (peak, total, weighted), _ = jax.lax.scan(step, carry, _slices(head, chunk))
    lse = peak + jnp.log(total)
    target = jnp.einsum("md,md->m", hidden, head[targets], preferred_element_type=jnp.float32)
    target = _capped(target, soft_cap) / temperature
    entropy = lse - weighted / total
    return (target - lse, entropy), (hidden, head, targets, temperature, lse, entropy)


def _backward(chunk, soft_cap, residuals, cotangents):
    hidden, head, targets, temperature, lse, entropy = residuals
    d_logp, d_entropy = (c[:, None] for c in cotangents)

    def step(carry, piece):
        d_hidden, d_head = carry
        start, skip = piece
        rows = jax.lax.dynamic_slice_in_dim(head, start, chunk)
        column = jnp.arange(chunk)[None]
        z = _logits(hidden, rows, soft_cap)
        logps = z / temperature - lse[:, None]
        p = jnp.exp(logps)
        hit = (start + column == targets[:, None]).astype(jnp.float32)
        d_z = d_logp * (hit - p) - d_entropy * p * (logps + entropy[:, None])
        d_z = jnp.where(column >= skip, d_z, 0.0) / temperature
        if soft_cap is not None:
            d_z *= 1.0 - (z / soft_cap) ** 2
        d_z = d_z.astype(hidden.dtype)
        d_hidden += jnp.einsum("mv,vd->md", d_z, rows, preferred_element_type=jnp.float32)
        d_rows = jnp.einsum("mv,md->vd", d_z, hidden, preferred_element_type=jnp.float32)
        old = jax.lax.dynamic_slice_in_dim(d_head, start, chunk)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, old + d_rows, start, axis=0)), None

    carry = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32))
    (d_hidden, d_head), _ = jax.lax.scan(step, carry, _slices(head, chunk))
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), None, jnp.zeros_like(temperature)


linear_logprob_chunked.defvjp(_forward, _backward)

"""`linear_logprob` in slices of the vocabulary, forward and backward: `[M, chunk]` is the largest array.

The forward pass keeps a running maximum m and two running sums, s = sum of e^(z-m) and w = sum of (z-m) e^(z-m) (the
online softmax of Milakov and Gimelshein 2018); then lse = m + log s and entropy = log s - w / s. The backward pass
computes each slice of the logits z again, and with p = e^(z-lse)

    dz = dlogp (hit - p) - dentropy p (z - lse + entropy) + dlse p,    dhidden = dz @ head,    dhead = dz^T @ hidden.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import launch
from pallas_kernels.numerics import LOWEST

SLICE_BYTES = 16 * 2**20  # of the float32 logits held at a time


def columns_held(chunk, rows, vocabulary):
    """Columns of a slice: what the caller asked for, else what `SLICE_BYTES` hold."""
    return min(max(1, SLICE_BYTES // (4 * rows)) if chunk is None else chunk, vocabulary)


def slices(vocabulary, chunk):
    """Start of each slice, and how many columns of it the one before has done: the last is moved back to fit."""
    nominal = jnp.arange(0, vocabulary, chunk)
    starts = jnp.minimum(nominal, vocabulary - chunk)
    return starts, nominal - starts


def _capped(z, soft_cap):
    return z if soft_cap is None else jnp.tanh(z / soft_cap) * soft_cap


def _logits(hidden, rows, soft_cap):
    return _capped(jnp.einsum("md,vd->mv", hidden, rows, preferred_element_type=jnp.float32), soft_cap)


def linear_logprob_forward(hidden, head, targets, temperature, chunk, soft_cap):
    """`(logp [M], entropy [M], lse [M])` in float32."""
    rows, vocabulary = hidden.shape[0], head.shape[0]
    chunk = columns_held(chunk, rows, vocabulary)

    def step(carry, piece):
        peak, total, weighted = carry
        start, done = piece
        z = _logits(hidden, lax.dynamic_slice_in_dim(head, start, chunk), soft_cap) / temperature
        if vocabulary % chunk:
            z = jnp.where(jnp.arange(chunk)[None] >= done, z, LOWEST)
        new_peak = jnp.maximum(peak, z.max(axis=1))
        below = z - new_peak[:, None]
        e, fall = jnp.exp(below), peak - new_peak
        weighted = jnp.exp(fall) * (weighted + fall * total) + (e * below).sum(axis=1)
        total = jnp.exp(fall) * total + e.sum(axis=1)
        return (new_peak, total, weighted), None

    carry = alike((jnp.full((rows,), LOWEST), jnp.zeros((rows,)), jnp.zeros((rows,))), hidden, head)
    (peak, total, weighted), _ = lax.scan(step, carry, slices(vocabulary, chunk))
    lse = peak + jnp.log(total)
    target = jnp.einsum("md,md->m", hidden, head[targets], preferred_element_type=jnp.float32)
    return _capped(target, soft_cap) / temperature - lse, jnp.log(total) - weighted / total, lse


def linear_logprob_backward(hidden, head, targets, temperature, results, cotangents, chunk, soft_cap, *, frozen):
    """Gradients of hidden and head, the latter None if the head is `frozen`."""
    _, entropy, lse = (x[:, None] for x in results)
    d_logp, d_entropy, d_lse = (x[:, None] for x in cotangents)
    chunk = columns_held(chunk, hidden.shape[0], head.shape[0])

    def gradient(start, rows):
        z = _logits(hidden, rows, soft_cap)
        logps = z / temperature - lse
        hit = start + jnp.arange(chunk)[None] == targets[:, None]
        d_z = jnp.exp(logps) * (d_lse - d_logp - d_entropy * (logps + entropy)) + jnp.where(hit, d_logp, 0.0)
        if soft_cap is not None:
            d_z *= 1.0 - (z / soft_cap) ** 2
        return (d_z / temperature).astype(hidden.dtype)

    return gradients(gradient, hidden, head, chunk, frozen=frozen)


def alike(carry, *arrays):
    """A loop's first carry, varying over devices as the arrays do that it meets."""
    return launch.vary(carry, launch.varying_axes(arrays))


def gradients(gradient, hidden, head, chunk, *, frozen):
    """Gradients of hidden and head from `gradient(start, rows)`, that of the logits `[M, chunk]` of one slice."""
    vocabulary = head.shape[0]

    def step(carry, piece):
        d_hidden, d_head = carry
        start, done = piece
        rows = lax.dynamic_slice_in_dim(head, start, chunk)
        d_z = gradient(start, rows)
        if not frozen:
            d_rows = jnp.einsum("mv,md->vd", d_z, hidden, preferred_element_type=head.dtype)
            d_head = lax.dynamic_update_slice_in_dim(d_head, d_rows, start, axis=0)
        if vocabulary % chunk:
            rows = jnp.where(jnp.arange(chunk)[:, None] >= done, rows, 0)
        d_hidden += jnp.einsum("mv,vd->md", d_z, rows, preferred_element_type=jnp.float32)
        return (d_hidden, d_head), None

    carry = alike((jnp.zeros(hidden.shape, jnp.float32), None if frozen else jnp.zeros_like(head)), hidden, head)
    (d_hidden, d_head), _ = lax.scan(step, carry, slices(vocabulary, chunk))
    return d_hidden.astype(hidden.dtype), d_head

"""Plain truth for `gae`, as a loop over time and as a scan of logarithmic depth."""

import jax
import jax.numpy as jnp


def gae_scan(r, v, mask, gamma, lam, next_v):
    """Advantages `[B, T]`; where `mask` is False, any number. Positions one after the other, the last one first."""

    def step(carry, now):
        next_adv, after = carry
        r, v, mask = now
        adv = r + gamma * after - v + gamma * lam * next_adv
        return (jnp.where(mask, adv, next_adv), jnp.where(mask, v, after)), adv

    return jax.lax.scan(step, (jnp.zeros_like(next_v), next_v), (r.T, v.T, mask.T), reverse=True)[1].T


def gae_associative_scan(r, v, mask, gamma, lam, next_v):
    """The same as two scans of associative operators, log2(T) steps each.

    The first finds the value at the next position with `mask`. The second composes the maps `x -> slope x + offset`
    from `adv` at the next position to `adv` at this one; a position without `mask` is the identity.
    """

    def nearest(later, earlier):
        return later[0] | earlier[0], jnp.where(earlier[0], earlier[1], later[1])

    def compose(later, earlier):
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    value = jnp.where(mask, v, 0)
    known, nearest_v = jax.lax.associative_scan(nearest, (mask, value), reverse=True, axis=1)
    nearest_v = jnp.where(known, nearest_v, next_v[:, None])
    after = jnp.concatenate([nearest_v[:, 1:], next_v[:, None]], axis=1)
    offset = jnp.where(mask, r + gamma * after - v, 0)
    slope = jnp.where(mask, gamma * lam, jnp.ones_like(offset))
    return jax.lax.associative_scan(compose, (slope, offset), reverse=True, axis=1)[1]

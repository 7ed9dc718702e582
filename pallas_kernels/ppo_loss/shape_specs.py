"""Calls of `ppo_loss` in real models."""

from functools import partial

import jax.numpy as jnp

from pallas_kernels.ppo_loss.api import ppo_loss
from pallas_kernels.shape_specs import RESPONSE, Call, Cost, forward_and_backward, nbytes, shape

ROWS = {"135m": 64, "1b": 16, "8b": 8, "70b": 4}  # responses of a micro-batch; a large model leaves room for few


def calls(model: str) -> list[Call]:
    """The loss of one micro-batch with a critic and a KL penalty."""
    token = shape(ROWS[model], RESPONSE, dtype=jnp.float32)
    mask = shape(ROWS[model], RESPONSE, dtype=jnp.bool)
    least = nbytes(*[token] * 8, mask) + nbytes(*[token] * 2)
    function = forward_and_backward(partial(_with_critic, clip=0.2), 0, 1, 2)
    costs = {"ppo_loss_forward": Cost(0, least, least)}
    return [Call(f"loss with critic and KL, {model}", function, (*[token] * 8, mask), costs)]


def _with_critic(logp, entropy, v, old_logp, old_v, adv, returns, ref_logp, mask, clip):
    return ppo_loss(
        logp,
        entropy,
        v,
        mask_t=mask,
        old_logp_t=old_logp,
        adv_t=adv,
        clip_low=clip,
        clip_high=clip,
        old_v_t=old_v,
        return_t=returns,
        value_clip=clip,
        value_coef=0.1,
        entropy_coef=0.01,
        ref_logp_t=ref_logp,
        kl_coef=0.05,
        kl_estimator="k3",
    )

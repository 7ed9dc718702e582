"""The loss of proximal policy optimisation, its statistics and its gradients in one pass over the tokens."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import Implementation, Operation, hopper_kernel
from pallas_kernels.ppo_loss import mosaic_gpu
from pallas_kernels.ppo_loss.reference import Constants, Numbers, PPOLoss, Trained, ppo_loss_reference
from pallas_kernels.ppo_loss.terms import KLEstimator, Number, check_estimator


def ppo_loss(
    logp_t: Float[Array, "*M"],
    entropy_t: Float[Array, "*M"],
    v_t: Float[Array, "*M"] | None,
    *,
    mask_t: Bool[Array, "*M"],
    old_logp_t: Float[Array, "*M"],
    adv_t: Float[Array, "*M"],
    clip_low: Number,
    clip_high: Number,
    dual_clip: Number | None = None,
    importance_t: Float[Array, "*M"] | None = None,
    old_v_t: Float[Array, "*M"] | None = None,
    return_t: Float[Array, "*M"] | None = None,
    value_clip: Number | None = None,
    value_coef: Number = 1.0,
    entropy_coef: Number = 0.0,
    ref_logp_t: Float[Array, "*M"] | None = None,
    kl_coef: Number = 0.0,
    kl_estimator: KLEstimator = "k1",
    implementation: str | None = None,
) -> PPOLoss:
    """Sum over tokens of `policy + value_coef value - entropy_coef entropy + kl_coef kl`, with statistics.

    Of every token where `mask_t`, with `ratio = exp(clip(logp - old_logp, -20, 20))`,

        policy = max(-adv ratio, -adv clip(ratio, 1 - clip_low, 1 + clip_high)),
                 where adv < 0 at most -adv dual_clip; times importance
        value  = 0.5 max((v - return)^2, (clip(v, old_v - value_clip, old_v + value_clip) - return)^2)
        kl     = with d = logp - ref_logp:  k1: d,  k2: d^2 / 2,  k3: exp(-d) - 1 + d (d within 20),  abs: |d|

    `k1+`, `k3+` and `abs+` have the value of the estimator named and the gradient of k2. Tokens outside the mask have
    no effect and no gradient, NaN included.

    Args:
      logp_t: nats, of the policy being trained. Every array has its shape; all are float32, or float64 for "xla".
      entropy_t: nats, of the policy being trained.
      v_t: values being trained; None: no value term.
      mask_t: True on the tokens that count.
      old_logp_t: nats, of the policy before the update.
      adv_t: advantages.
      clip_low, clip_high: the ratio's clip range below and above 1.
      dual_clip: above 1; None: off.
      importance_t: weight of each token's policy term; None: 1.
      old_v_t, return_t: values before the update and what they should have been; with `v_t`.
      value_clip: largest step of a value that is not penalised; None: the first square alone.
      value_coef, entropy_coef, kl_coef: weights; like the clip ranges numbers that may be traced.
      ref_logp_t: nats, of the reference policy; None: no KL term.
      kl_estimator: see above.
      implementation: "mosaic_gpu", "xla", or None for the first of them that can serve the call.

    Gradients flow from `total`, and to `logp_t`, `entropy_t` and `v_t` alone. Where two of a maximum are equal in a
    way that changes the gradient (a ratio exactly on its bound), it is one of theirs or between them.

    Raises:
      ValueError: shapes that do not belong together, values or returns without each other, an unknown estimator or
        implementation.
      NotImplementedError: the named implementation cannot serve the call; all reasons.

    References: Schulman et al., Proximal Policy Optimization Algorithms, 2017, eq. 7; Ye et al., Mastering Complex
    Control in MOBA Games, 2019, eq. 5 (dual clip); Schulman, Approximating KL Divergence, 2020.
    """
    trained = Trained(logp_t, entropy_t, v_t)
    constants = Constants(mask_t, old_logp_t, adv_t, old_v_t, return_t, ref_logp_t, importance_t)
    for name, x in (trained._asdict() | constants._asdict()).items():
        if x is not None and x.shape != logp_t.shape:
            raise ValueError(f"{name} {x.shape} is not like logp {logp_t.shape}")
    if mask_t.dtype != jnp.bool:
        raise ValueError(f"mask {mask_t.dtype} is not bool")
    if len({v_t is None, old_v_t is None, return_t is None}) > 1:
        raise ValueError("v_t, old_v_t and return_t belong together: give all of them or none")
    check_estimator(kl_estimator)
    numbers = Numbers(clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef, kl_coef)
    return OPERATION(implementation, trained, constants, numbers, kl_estimator)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mosaic(trained, constants, numbers, kl_estimator):
    return mosaic_gpu.ppo_loss_forward(trained, constants, numbers, kl_estimator, gradients=False)[0]


def _forward(trained, constants, numbers, kl_estimator):
    loss, d_logp, d_v = mosaic_gpu.ppo_loss_forward(trained, constants, numbers, kl_estimator, gradients=True)
    return loss, (d_logp, d_v, constants.mask, jnp.asarray(numbers.entropy_coef, d_logp.dtype))


def _backward(kl_estimator, residuals, cotangents):
    d_logp, d_v, mask, entropy_coef = residuals
    scale = cotangents.total
    d_entropy = jnp.where(mask, -entropy_coef * scale, 0.0)
    return Trained(scale * d_logp, d_entropy, None if d_v is None else scale * d_v), None, None


_mosaic.defvjp(_forward, _backward)

OPERATION = Operation(
    "ppo_loss",
    {
        "mosaic_gpu": hopper_kernel(_mosaic, mosaic_gpu.reasons),
        "xla": Implementation(ppo_loss_reference),
    },
)

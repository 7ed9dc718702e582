"""Direct preference optimisation: a policy from preferences without reward model and rollouts.

References: Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward Model, 2023; Azar
et al., A General Theoretical Paradigm to Understand Learning from Human Preferences (IPO), 2023; Mitchell, A Note on
DPO with Noisy Preferences (label smoothing), 2023.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Lt
from jaxtyping import Array, Bool, Float

from rapidfire_jax.algorithms import offline
from rapidfire_jax.algorithms.binding import bind
from rapidfire_jax.algorithms.masking import Mean, PartialMetrics
from rapidfire_jax.algorithms.offline import PreferenceBatch, counted, only


@dataclasses.dataclass(frozen=True)
class DPOConfig(offline.OfflineConfig):
    """What fixes the shape of the computation. Static under jit."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    reference_free: bool = False  # as if the reference gave every response the same probability
    average_log_prob: bool = False  # log-probabilities of responses are means over their tokens, not sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DPOHParams(offline.OfflineHParams):
    """Numbers that may change between calls without a new compilation; vmap over them for a sweep."""

    beta: Annotated[float, Gt(0)] = 0.1
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0  # probability that a pair is the wrong way round


def response_log_prob(
    logp_t: Float[Array, "*B T"], mask_t: Bool[Array, "*B T"], average: bool = False
) -> Float[Array, "*B"]:
    """Log-probability of each response, nats: the sum over its tokens, or their mean."""
    total = jnp.where(mask_t, logp_t, 0.0).sum(axis=-1)
    return total / jnp.maximum(mask_t.sum(axis=-1, dtype=total.dtype), 1.0) if average else total


def dpo_loss(
    logp: Float[Array, "B 2"],
    ref_logp: Float[Array, "B 2"],
    hparams: DPOHParams,
    config: DPOConfig = DPOConfig(),
    valid: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], PartialMetrics]:
    """Loss of pairs as `(sum, count, metrics)`. With `h = (logp - ref_logp)[chosen] - (logp - ref_logp)[rejected]`:

        sigmoid    -(1 - label_smoothing) log s(beta h) - label_smoothing log s(-beta h),  s the logistic function
        ipo        (h - 1 / (2 beta))^2

    Args:
      logp: log-probability of the chosen and of the rejected response, nats; gradients flow to it.
      ref_logp: the same under the reference; a constant, and of no effect with `config.reference_free`.
      hparams, config: settings.
      valid: pairs that count; None: all.

    Returns:
      Sum over pairs, number of pairs, metrics: implicit rewards `beta (logp - ref_logp)`, their margin, and the share
      of pairs whose chosen response has the larger one.

    References:
      Rafailov et al. 2023, eq. 7; Mitchell 2023, eq. 3; Azar et al. 2023, eq. 17 (their tau is beta).
    """
    logp, ref_logp = only(logp, valid), only(ref_logp, valid)
    relative = logp if config.reference_free else logp - jax.lax.stop_gradient(ref_logp)
    h = relative[:, 0] - relative[:, 1]
    if config.loss == "sigmoid":
        right, wrong = (jax.nn.log_sigmoid(sign * hparams.beta * h) for sign in (1.0, -1.0))
        loss = -(1.0 - hparams.label_smoothing) * right - hparams.label_smoothing * wrong
    else:
        loss = (h - 1.0 / (2.0 * hparams.beta)) ** 2
    reward = hparams.beta * jax.lax.stop_gradient(relative)
    margin = reward[:, 0] - reward[:, 1]
    still = jax.lax.stop_gradient(logp)
    averages = {
        "accuracy": (margin > 0).astype(h.dtype),
        "margin": margin,
        "reward/chosen": reward[:, 0],
        "reward/rejected": reward[:, 1],
        "logp/chosen": still[:, 0],
        "logp/rejected": still[:, 1],
    }
    return *counted(loss, valid), {name: Mean(*counted(values, valid)) for name, values in averages.items()}


def dpo_objective(
    frozen: Any, trainable: Any, batch: PreferenceBatch, hparams: DPOHParams, config: DPOConfig, model: Any
) -> tuple[Float[Array, ""], Float[Array, ""], PartialMetrics]:
    """`dpo_loss` of a batch under a policy and its reference, chosen and rejected responses in one pass."""
    rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    length, valid = batch.mask_t.shape[-1], batch.mask_t.any(axis=(1, 2))
    inputs = model.encode(frozen, rows(batch.tokens), rows(batch.attention_mask))
    logp_t = model.apply(frozen, trainable, inputs, length, 1.0).logp_t
    logp = response_log_prob(logp_t.reshape(batch.mask_t.shape), batch.mask_t, config.average_log_prob)
    if config.reference_free:
        return dpo_loss(logp, jnp.zeros_like(logp), hparams, config, valid)
    ref_logp_t = model.reference(frozen, inputs, length, 1.0).reshape(batch.mask_t.shape)
    ref_logp = response_log_prob(ref_logp_t, batch.mask_t, config.average_log_prob)
    return dpo_loss(logp, ref_logp, hparams, config, valid)


ALGORITHM = offline.OfflineAlgorithm(DPOConfig, DPOHParams, dpo_objective, ("preferences",), "policy", "dpo")

dpo_step = bind(offline.step, ALGORITHM, "dpo_step")

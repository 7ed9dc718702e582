"""Advantage estimators: with a critic, from returns, and from other responses to the same prompt."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import gae

type Scaling = Literal["std", "none"]


def discounted_returns(
    r_t: Float[Array, "B T"], mask_t: Bool[Array, "B T"], gamma: Float[Array, ""] | float
) -> Float[Array, "B T"]:
    """`return_t = r_t + gamma return_{t+1}` over the positions where `mask_t`; 0 elsewhere."""
    return gae(r_t, jnp.zeros_like(r_t), mask_t, gamma, 1.0)[0]


def group_advantages(score: Float[Array, " B"], group_size: int, scaling: Scaling = "std") -> Float[Array, " B"]:
    """Score of each response relative to the others of its prompt: `score - mean`, over `std + 1e-4` if so scaled.

    Args:
      score: of B = P x G responses; the G of a prompt stand next to each other.
      group_size: G; the standard deviation is the unbiased one.
      scaling: "std" as in GRPO; "none" as in Dr. GRPO, which does not overweight prompts that are nearly solved or
        nearly hopeless.

    References:
      Shao et al., DeepSeekMath, 2024, sec. 4.1.2; Liu et al., Understanding R1-Zero-Like Training, 2025, sec. 3.2.
    """
    groups = _groups(score, group_size)
    groups = groups - groups[:, :1]  # equal scores are exactly 0 then, which their rounded mean does not make them
    centred = groups - groups.mean(axis=1, keepdims=True)
    if scaling == "std":
        variance = (centred**2).sum(axis=1, keepdims=True) / max(group_size - 1, 1)
        centred = centred / (jnp.sqrt(variance) + 1e-4)
    return centred.reshape(-1)


def leave_one_out_advantages(score: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """`score_i - mean of the other G - 1 scores of the same prompt`.

    Args:
      score: of B = P x G responses; the G of a prompt stand next to each other.
      group_size: G, at least 2.

    References:
      Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free!, 2019; Ahmadian et al., Back to Basics, 2024,
      eq. 8.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: leaving one out needs at least 2 responses a prompt")
    groups = _groups(score, group_size)
    groups = groups - groups[:, :1]  # as in `group_advantages`
    others = (groups.sum(axis=1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(-1)


def informative_groups(score: Float[Array, " B"], group_size: int) -> Bool[Array, " B"]:
    """True for the responses of prompts whose responses were not all scored alike: only these have a gradient.

    References:
      Yu et al., DAPO, 2025, sec. 3.2 (dynamic sampling).
    """
    groups = _groups(score, group_size)
    return (groups.max(axis=1) > groups.min(axis=1)).repeat(group_size)


def _groups(score: Float[Array, " B"], group_size: int) -> Float[Array, "P G"]:
    if score.shape[0] % group_size:
        raise ValueError(f"{score.shape[0]} responses cannot be cut into groups of {group_size}")
    return score.reshape(-1, group_size)

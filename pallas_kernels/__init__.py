"""GPU kernels usable on their own: they know jax and nothing of RLHF."""

from pallas_kernels.linear_logprob.api import LogProbs, linear_logprob
from pallas_kernels.rms_norm.api import Normed, rms_norm

__all__ = ["LogProbs", "Normed", "linear_logprob", "rms_norm"]

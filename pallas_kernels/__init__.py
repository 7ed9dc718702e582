"""GPU kernels usable on their own: they know jax and nothing of RLHF."""

from pallas_kernels.linear_logprob.api import LogProbs, linear_logprob

__all__ = ["LogProbs", "linear_logprob"]

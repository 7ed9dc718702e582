"""GPU kernels usable on their own: they know jax and nothing of RLHF."""

from pallas_kernels.adamw_8bit.api import Moments, adamw_8bit, init_moments
from pallas_kernels.decode_attention.api import decode_attention, quantize_cache
from pallas_kernels.flash_attention.api import Attended, flash_attention
from pallas_kernels.gae.api import Advantages, gae
from pallas_kernels.linear_logprob.api import LogProbs, linear_logprob
from pallas_kernels.ppo_loss.api import PPOLoss, ppo_loss
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.formats import Quantized, dequantize, quantize, unpack
from pallas_kernels.rms_norm.api import Normed, rms_norm
from pallas_kernels.sampling.api import Sample, sample

__all__ = [
    "Advantages",
    "Attended",
    "LogProbs",
    "Moments",
    "Normed",
    "PPOLoss",
    "Quantized",
    "Sample",
    "adamw_8bit",
    "decode_attention",
    "dequantize",
    "flash_attention",
    "gae",
    "init_moments",
    "linear_logprob",
    "ppo_loss",
    "quantize",
    "quantize_cache",
    "quantized_matmul",
    "rms_norm",
    "sample",
    "unpack",
]

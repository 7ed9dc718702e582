"""Every operation with the calls that real models make of it."""

from collections.abc import Callable
from typing import NamedTuple

from pallas_kernels.adamw_8bit import api as adamw_8bit
from pallas_kernels.adamw_8bit import shape_specs as adamw_8bit_specs
from pallas_kernels.decode_attention import api as decode_attention
from pallas_kernels.decode_attention import shape_specs as decode_attention_specs
from pallas_kernels.dispatch import Operation
from pallas_kernels.flash_attention import api as flash_attention
from pallas_kernels.flash_attention import shape_specs as flash_attention_specs
from pallas_kernels.gae import api as gae
from pallas_kernels.gae import shape_specs as gae_specs
from pallas_kernels.linear_logprob import api as linear_logprob
from pallas_kernels.linear_logprob import shape_specs as linear_logprob_specs
from pallas_kernels.ppo_loss import api as ppo_loss
from pallas_kernels.ppo_loss import shape_specs as ppo_loss_specs
from pallas_kernels.quantized_matmul import api as quantized_matmul
from pallas_kernels.quantized_matmul import shape_specs as quantized_matmul_specs
from pallas_kernels.rms_norm import api as rms_norm
from pallas_kernels.rms_norm import shape_specs as rms_norm_specs
from pallas_kernels.sampling import api as sampling
from pallas_kernels.sampling import shape_specs as sampling_specs
from pallas_kernels.shape_specs import Call


class Entry(NamedTuple):
    """An operation's dispatcher and its calls by model."""

    operation: Operation
    calls: Callable[[str], list[Call]]  # of a name in `shape_specs.MODELS`


CATALOGUE = {
    "adamw_8bit": Entry(adamw_8bit.OPERATION, adamw_8bit_specs.calls),
    "ppo_loss": Entry(ppo_loss.OPERATION, ppo_loss_specs.calls),
    "decode_attention": Entry(decode_attention.OPERATION, decode_attention_specs.calls),
    "flash_attention": Entry(flash_attention.OPERATION, flash_attention_specs.calls),
    "linear_logprob": Entry(linear_logprob.OPERATION, linear_logprob_specs.calls),
    "quantized_matmul": Entry(quantized_matmul.OPERATION, quantized_matmul_specs.calls),
    "gae": Entry(gae.OPERATION, gae_specs.calls),
    "rms_norm": Entry(rms_norm.OPERATION, rms_norm_specs.calls),
    "sampling": Entry(sampling.OPERATION, sampling_specs.calls),
}

"""Writes nf4.npz: weights and what bitsandbytes on a CPU makes of them, double-quantised NF4 in blocks of 64.

Runs in an environment of its own (Python 3.11, torch 2.13.0, bitsandbytes 0.50.2), without arguments.
"""

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional

torch.manual_seed(0)
# 7 groups a row, so that blocks of 256 scales end inside one; stored as float16, which loses nothing.
weights = (torch.rand(64, 448) * 2 - 1).half().float() * 2**-6
weights[5, 64:128] = 0  # the first block has its largest centred scale below zero
weights[6, :64] = torch.linspace(-1, 1, 64).half().float() * 2**-6
weights[40:50] *= 0.125
weights[60, 100] = 3  # and the second above

packed, state = functional.quantize_4bit(weights, blocksize=64, compress_statistics=True, quant_type="nf4")
both = packed.reshape(-1).numpy()
np.savez_compressed(
    Path(__file__).with_name("nf4.npz"),
    weights=weights.half().numpy(),
    codes=np.stack([both >> 4, both & 15], axis=-1).reshape(weights.shape),
    scale_codes=state.absmax.numpy().reshape(64, -1),
    codebook=state.code.numpy(),
    dequantized=functional.dequantize_4bit(packed, state).numpy(),
)

"""Every operation with the calls that real models make of it."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from pallas_kernels.dispatch import Operation
from pallas_kernels.shape_specs import Call


class Entry(NamedTuple):
    """An operation's dispatcher and its calls by model."""

    operation: Operation
    calls: Callable[[str], list[Call]]  # of a name in `shape_specs.MODELS`


OPERATIONS = (
    "flash_attention",
    "decode_attention",
    "linear_logprob",
    "quantized_matmul",
    "rms_norm",
    "sampling",
    "ppo_loss",
    "gae",
    "adamw_8bit",
)
CATALOGUE = {
    name: Entry(
        import_module(f"pallas_kernels.{name}.api").OPERATION, import_module(f"pallas_kernels.{name}.shape_specs").calls
    )
    for name in OPERATIONS
}

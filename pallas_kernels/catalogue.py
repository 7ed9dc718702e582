"""Every operation with the calls that real models make of it."""

from collections.abc import Callable
from typing import NamedTuple

from pallas_kernels.dispatch import Operation
from pallas_kernels.rms_norm import api as rms_norm
from pallas_kernels.rms_norm import shape_specs as rms_norm_specs
from pallas_kernels.shape_specs import Call


class Entry(NamedTuple):
    """An operation's dispatcher and its calls by model."""

    operation: Operation
    calls: Callable[[str], list[Call]]  # of a name in `shape_specs.MODELS`


CATALOGUE = {
    "rms_norm": Entry(rms_norm.OPERATION, rms_norm_specs.calls),
}

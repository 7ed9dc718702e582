"""What every operation owes: kernels that lower and compile for an H100 at the shapes of real models, and reasons."""

import jax
import pytest

from pallas_kernels import hopper
from pallas_kernels.catalogue import CATALOGUE
from pallas_kernels.shape_specs import MODELS, Call

CALLS = [
    pytest.param(call, id=f"{name}: {call.name}")
    for name, entry in CATALOGUE.items()
    for model in MODELS
    if model != "135m"
    for call in entry.calls(model)
]
needs_compiler = pytest.mark.skipif(bool(hopper.toolchain()), reason="; ".join(hopper.toolchain()))


@pytest.mark.parametrize("call", CALLS)
def test_lowers_for_an_h100_and_contains_its_kernels(call: Call):
    counts = hopper.kernel_counts(hopper.lower(call.function, *call.args))
    assert counts.keys() == call.costs.keys()


@needs_compiler
@pytest.mark.parametrize("call", CALLS)
def test_compiles_without_spills_within_shared_memory(call: Call):
    found = hopper.machine_code(call.function, *call.args)
    assert {code.kernel for code in found} == call.costs.keys()
    for code in found:
        assert code.spill_bytes == 0, code
        assert code.shared_bytes <= hopper.SHARED_MEMORY, code


@pytest.mark.parametrize("name", CATALOGUE)
def test_on_a_cpu_the_kernel_is_refused_with_its_reason(name: str):
    call = CATALOGUE[name].calls("8b")[0]
    jax.eval_shape(call.function, *call.args)
    assert not hopper.kernel_counts(jax.jit(call.function).trace(*call.args).lower())

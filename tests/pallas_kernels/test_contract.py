"""What every operation owes: kernels that lower and compile for an H100 at the shapes of real models, and reasons."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch, hopper
from pallas_kernels.catalogue import CATALOGUE
from pallas_kernels.shape_specs import MODELS, Call, random_arguments
from tests.helpers.agreement import assert_close
from tests.helpers.tolerances import KERNEL
from tests.pallas_kernels.test_adamw_8bit import assert_same

NAMED = [
    pytest.param(name, call, id=f"{name}: {call.name}", marks=() if model == "8b" else pytest.mark.slow)
    for name, entry in CATALOGUE.items()
    for model in MODELS
    if model != "135m"
    for call in entry.calls(model)
]
CALLS = [pytest.param(named.values[1], id=named.id, marks=named.marks) for named in NAMED]
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


@pytest.mark.skipif(bool(hopper.why_not_hopper()), reason="there is no Hopper GPU")
@pytest.mark.parametrize(("name", "call"), NAMED)
def test_on_a_hopper_gpu_agrees_with_the_reference_in_float32(name: str, call: Call):
    args = random_arguments(call)
    with dispatch.record() as choices:
        found = jax.jit(lambda *args: call.function(*args))(*args)
    assert {choice.implementation for choice in choices} == {"mosaic_gpu"}

    def wide(x):  # the optimiser's state is what is compared, bit by bit
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) and name != "adamw_8bit" else x

    def one_row(args):
        return call.function(*(x[None] for x in args))

    with dispatch.prefer("xla", "chunked", "scan"):
        if name == "flash_attention":  # whose scores are too many for several rows at a time
            wanted = jax.jit(lambda *args: jax.lax.map(one_row, args))(*map(wide, args))
            wanted = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), wanted)
        else:
            wanted = jax.jit(lambda *args: call.function(*args))(*map(wide, args))
    if name == "adamw_8bit":
        assert_same(found, wanted)
    else:
        assert_close(found, wanted, KERNEL[name][str(call.args[0].dtype)])


@pytest.mark.parametrize("name", CATALOGUE)
def test_on_a_cpu_the_kernel_is_refused_with_its_reason(name: str):
    call = CATALOGUE[name].calls("8b")[0]
    jax.eval_shape(call.function, *call.args)
    assert not hopper.kernel_counts(jax.jit(call.function).trace(*call.args).lower())

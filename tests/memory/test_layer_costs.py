"""Against jax's own partial evaluation: what a program with a plan computes and keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.flash_attention.api import flash_attention
from rapidfire_jax.memory.devices import find_device
from rapidfire_jax.memory.layer_costs import KERNEL_FLOPS, layer_costs, set_sums
from rapidfire_jax.models.remat import FULL, NAMES, keep_names
from tests.memory.conftest import KINDS, SLOW, kept_bytes, product_flops


@pytest.mark.parametrize("kind", KINDS)
def test_flops_and_bytes_of_plans_are_those_of_their_programs(problem, kind):
    own = problem(kind)
    full = own.traced(FULL)
    costs = layer_costs(full, SLOW)
    assert costs.layers == 4
    assert costs.trained == sum(leaf.nbytes for leaf in jax.tree.leaves(own.adapters))
    random = np.random.default_rng(0)
    every = len(costs.flops) - 1
    for number in {0, every, *random.integers(0, every, 5).tolist()}:
        names = [name for i, name in enumerate(costs.names) if number >> i & 1]
        program = own.traced(keep_names(*names))
        saved = product_flops(full.jaxpr) - product_flops(program.jaxpr)
        assert saved == 4 * (costs.flops[0] - costs.flops[number]), names
        kept = kept_bytes(program.jaxpr) - kept_bytes(full.jaxpr)
        assert kept == 4 * sum(costs.nbytes[costs.names.index(name)] for name in names), names
        assert kept == 4 * set_sums(costs.nbytes)[costs.subset(*names)]
    plain = own.traced(None)
    assert product_flops(full.jaxpr) - product_flops(plain.jaxpr) == 4 * costs.flops[0]
    assert kept_bytes(plain.jaxpr) - kept_bytes(full.jaxpr) == 4 * costs.everything


def test_the_last_layer_counts_though_less_of_it_is_wanted(problem):
    own = problem("llama")
    whole, part = layer_costs(own.traced(FULL), SLOW), layer_costs(own.traced(FULL, slice(-4, None)), SLOW)
    assert whole.layers == part.layers == 4
    for name in ("flops", "nbytes", "seconds"):
        np.testing.assert_allclose(getattr(whole, name), getattr(part, name), rtol=1e-12)
    alone = problem("llama", layers=1)
    one = layer_costs(alone.traced(FULL), SLOW)
    np.testing.assert_array_equal(one.flops, whole.flops)
    assert (one.layers, one.names) == (1, whole.names)
    assert layer_costs(alone.traced(FULL, slice(-4, None)), SLOW).flops[0] < one.flops[0]


def test_names_that_save_nothing_are_left_out(problem):
    """Post-norms want what goes into them; names inside of kernels are not there without kernels."""
    found = set(layer_costs(problem("llama").traced(FULL), SLOW).names)
    assert found == set(NAMES) - {"attention_update", "rstd", "mlp_update"}
    assert set(layer_costs(problem("gemma2").traced(FULL), SLOW).names) == set(NAMES) - {"rstd"}


def test_seconds_by_hand(problem):
    """Keeping all but one activation: the product that makes it, what the adapter adds, and less to write and read."""
    own = problem("llama", width=32, ffn=48, length=8)
    costs = layer_costs(own.traced(FULL), SLOW)
    rows, every = 3 * 8, len(costs.seconds) - 1
    floats = lambda *sizes: 4 * sum(sizes)  # noqa: E731
    roofline = lambda flops, nbytes: max(flops / 2e9, nbytes / 1e9)  # noqa: E731
    x, y, w, a, b = rows * 32, rows * 48, 32 * 48, rows * 2, 2 * 48
    product = roofline(2 * rows * 32 * 48, floats(x, w, y))
    adapter = roofline(2 * rows * 2 * 48, floats(a, b, y))
    scaled = 2 * floats(b) / 1e9  # the scale on B: read and written
    added = floats(y, y) / 1e9  # both products are read; the sum is no product's operand
    without = costs.seconds[every ^ costs.subset("up")]
    expected = costs.seconds[every] + product + adapter + scaled + added - 2 * floats(y) / 1e9
    assert without - floats(y) / 1e9 <= expected <= without + floats(y) / 1e9  # what else reads `up` may read it fused


def test_more_kept_is_never_more_work(problem):
    costs = layer_costs(problem("gemma2").traced(FULL), SLOW)
    for i in range(len(costs.names)):
        pairs = costs.flops.reshape(-1, 2, 2**i)
        assert (pairs[:, 1] <= pairs[:, 0]).all()


def test_two_passes_cost_both(problem):
    own = problem("llama")
    twice = jax.make_jaxpr(lambda *args: (own.gradient(FULL)(*args), own.gradient(FULL)(*args)))
    one = layer_costs(own.traced(FULL), SLOW)
    both = layer_costs(twice(own.adapters, own.frozen), SLOW)
    np.testing.assert_array_equal(both.flops, 2 * one.flops)
    np.testing.assert_array_equal(both.nbytes, 2 * one.nbytes)


def test_a_program_without_recomputation_is_refused(problem):
    with pytest.raises(ValueError, match="no layers are computed again"):
        layer_costs(problem("llama").traced(None), SLOW)


def test_kernels_of_an_h100_count_and_keep_what_their_backward_passes_read(problem):
    own = problem("llama", width=128, ffn=256, length=64, head=64, dtype=jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(hopper.abstract_mesh()):
        costs = layer_costs(own.traced(FULL), find_device("h100-80gb"))
    assert {"attention_lse", "rstd"} < set(costs.names)
    every = len(costs.flops) - 1
    attention = 2 * 3 * 64 * 64 * 2 * 64
    for name in ("attention_out", "attention_lse"):  # one kernel makes both
        assert costs.flops[every ^ costs.subset(name)] == attention
    assert costs.flops[every] == 0


def test_kernel_flops_are_those_of_the_xla_implementations():
    q, k = jnp.zeros((2, 24, 4, 64), jnp.bfloat16), jnp.zeros((2, 40, 2, 64), jnp.bfloat16)
    whole = product_flops(jax.make_jaxpr(lambda q, k: flash_attention(q, k, k, implementation="xla").out)(q, k).jaxpr)
    assert KERNEL_FLOPS["flash_attention_forward"]([q, k, k], [q]) == whole / 2  # no query sees a later key

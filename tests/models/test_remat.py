"""Plans change what is kept, and nothing else."""

import jax
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import hopper
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.remat import DOTS, FULL, NAMES, PRODUCTS, Group, Remat, keep_names
from tests.memory.conftest import KINDS, problem  # noqa: F401

PLANS = {
    "full": FULL,
    "dots": DOTS,
    "products": PRODUCTS,
    "all names": keep_names(*NAMES),
    "some names": keep_names("query", "residual", "attention_lse", "up"),
    "mixed": Remat((Group(2, keep=("key", "mlp_hidden")), Group())),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_bit_identical(problem, kind):  # noqa: F811
    own = problem(kind)
    expected = jax.jit(own.gradient(None))(own.adapters, own.frozen)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    for remat in PLANS.values() if kind == "llama" else (FULL, PLANS["mixed"]):
        found = jax.jit(own.gradient(remat))(own.adapters, own.frozen)
        jax.tree.map(almost_equal if kind == "gpt_neox" else np.testing.assert_array_equal, found, expected)


def almost_equal(found, expected):
    """The exact GELU: XLA expands erfc and its derivative, which share an exponential if they stand in one loop."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


def test_gradients_of_all_weights(problem):  # noqa: F811
    own = problem("llama")

    def loss(weights, remat):
        model = nnx.merge(own.graphdef, own.adapters, weights)
        return (model.hidden(own.tokens, own.mask, remat=remat) * own.weights).sum()

    found, expected = (jax.jit(jax.grad(lambda w, r=r: loss(w, r)))(own.frozen) for r in (PLANS["mixed"], None))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())  # noqa: E731
    jax.tree.map(close, found, expected)


def temporaries(own, remat) -> int:
    step = jax.jit(own.gradient(remat)).lower(own.adapters, own.frozen).compile()
    return step.memory_analysis().temp_size_in_bytes


def test_groups_do_not_copy_frozen_weights(problem):  # noqa: F811
    own = problem("llama", width=64, ffn=512)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(own.frozen))
    cut = Remat((Group(2), Group()))
    assert abs(temporaries(own, cut) - temporaries(own, FULL)) < weights / 8


def test_a_group_of_two_layers_more_keeps_what_two_layers_keep(problem):  # noqa: F811
    own = problem("llama", layers=6, length=48)
    two, four = (temporaries(own, Remat((Group(n, keep=("gate", "up")), Group()))) for n in (2, 4))
    assert four - two == pytest.approx(2 * 2 * own.mask.size * 40 * 4, rel=0.1)


def test_offloaded_activations_go_to_pinned_memory_of_the_host(problem):  # noqa: F811
    own = problem("llama")
    plan = Remat((Group(keep=("query",), offload=("gate", "residual")),))
    for remat, count in ((plan, True), (keep_names("query", "gate", "residual"), False)):
        text = hopper.lower(own.gradient(remat), own.adapters, own.frozen).as_text()
        assert ("pinned_host" in text) == count


def test_spans():
    plan = Remat((Group(2, keep=("up",)), Group(3), Group()))
    assert [(a, b) for a, b, _ in plan.spans(9)] == [(0, 2), (2, 5), (5, 9)]
    assert [(a, b) for a, b, _ in plan.spans(4)] == [(0, 2), (2, 4)]
    with pytest.raises(InputError, match="the plan is for 2 layers, the stack has 4"):
        Remat((Group(2),)).spans(4)


def test_unknown_names_are_told_all():
    with pytest.raises(InputError, match=r"'gates'; accepted: attention_norm, .*, lora"):
        keep_names("up", "gates")
    with pytest.raises(InputError, match="'gates'"):
        Group(offload=("gates",))

"""Hidden states of some positions are those of all, for less work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.models.layers import take
from rapidfire_jax.models.policy import make_policy
from rapidfire_jax.models.remat import FULL, PRODUCTS, Group, Remat
from rapidfire_jax.models.scorer import make_scorer
from tests.helpers.tiny import padded_batch, tiny_model
from tests.helpers.tolerances import F32_LONG
from tests.memory.conftest import KINDS, problem, product_flops  # noqa: F401

MIXED = Remat((Group(2, keep=("key", "mlp_hidden")), Group(1, keep=("up",)), Group()))
EACH = jnp.array([[10, 7], [10, 10], [5, 9]])  # of rows whose first 0, 3 and 5 tokens are padding


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("at", [slice(-4, None), slice(-1, None), slice(2, 7), EACH], ids=["4", "1", "2-7", "each"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients(problem, kind, at):  # noqa: F811
    own = problem(kind)
    model = nnx.merge(own.graphdef, own.adapters, own.frozen)
    whole = model.hidden(own.tokens, own.mask)
    np.testing.assert_allclose(model.hidden(own.tokens, own.mask, at=at), take(whole, at), **F32_LONG)

    def loss(adapters, frozen):
        states = nnx.merge(own.graphdef, adapters, frozen).hidden(own.tokens, own.mask)
        return (take(states, at) * take(own.weights, at)).sum()

    expected = jax.jit(jax.grad(loss))(own.adapters, own.frozen)
    for remat in (None, FULL, MIXED) if kind == "llama" else (PRODUCTS,):
        jax.tree.map(close, jax.jit(own.gradient(remat, at))(own.adapters, own.frozen), expected)


@pytest.mark.parametrize("split", [None, 1, 3])
@pytest.mark.parametrize("remat", [None, FULL, MIXED], ids=["none", "full", "mixed"])
def test_gradients_of_all_weights_in_one_stack_or_two(split, remat):
    model = tiny_model(num_layers=4)
    tokens, mask = padded_batch([3, 8, 5], 8)
    if split is not None:
        model.split_blocks(split)
    graphdef, weights = nnx.split(model)

    def loss(weights, at, remat):
        return jnp.sin(nnx.merge(graphdef, weights).hidden(tokens, mask, at=at, remat=remat)[:, -3:]).sum()

    found = jax.jit(jax.grad(lambda w: loss(w, slice(-3, None), remat)))(weights)
    jax.tree.map(close, found, jax.jit(jax.grad(lambda w: loss(w, None, None)))(weights))


def test_what_the_last_layer_does_not_compute(problem):  # noqa: F811
    own = problem("llama")
    model = nnx.merge(own.graphdef, own.adapters, own.frozen)
    run = lambda at: product_flops(jax.make_jaxpr(lambda: model.hidden(own.tokens, own.mask, at=at))().jaxpr)  # noqa: E731
    width, ffn, rank = 24, 40, 2
    a_token = 2 * (width * width + 3 * width * ffn + rank * (2 * width + 3 * (width + ffn)))
    assert run(None) - run(slice(-4, None)) == 3 * (11 - 4) * a_token
    assert run(None) - run(EACH) == 3 * (11 - 2) * a_token


@pytest.mark.parametrize("split", [False, True])
def test_prefill(split):
    model = tiny_model()
    if split:
        model.split_blocks(1)
    tokens, mask = padded_batch([3, 8, 5], 8)
    whole, expected = model.prefill(tokens, mask, 12)
    last, cache = model.prefill(tokens, mask, 12, at=slice(-1, None))
    np.testing.assert_allclose(last, whole[:, -1:], **F32_LONG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **F32_LONG), cache, expected)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0, "targets": "all-linear"},
                                  {"rank": 2, "alpha": 4.0, "targets": "all-linear", "layers": 1}])  # fmt: skip
@pytest.mark.parametrize("layers", [1, 3])
def test_policies_and_scorers_of_any_depth(layers, lora):
    tokens, mask = padded_batch([6, 8, 7], 8)
    plain = tiny_model(num_layers=layers)
    expected = jax.nn.log_softmax(plain(tokens, mask))[:, 4:-1]
    expected = jnp.take_along_axis(expected, tokens[:, 5:, None], axis=2)[..., 0]
    policy, frozen, trainable = make_policy(tiny_model(num_layers=layers), jax.random.key(0), lora=lora)
    inputs = policy.encode(frozen, tokens, mask)
    np.testing.assert_allclose(policy.apply(frozen, trainable, inputs, 3, 1.0).logp_t, expected, **F32_LONG)
    np.testing.assert_allclose(policy.reference(frozen, inputs, 3, 1.0), expected, **F32_LONG)
    every = policy.apply(frozen, trainable, inputs, 7, 1.0).logp_t  # as many as there are: no layer is cut short
    np.testing.assert_allclose(every[:, -3:], expected, **F32_LONG)

    reward = RewardModel.from_causal(plain, jax.random.key(1))
    score = reward(tokens, mask)
    scorer, frozen, trainable = make_scorer(reward, jax.random.key(0), lora=lora)
    np.testing.assert_allclose(scorer.apply(frozen, trainable, tokens, mask), score, **F32_LONG)
    gradient = jax.grad(lambda t: scorer.apply(frozen, t, tokens, mask).sum())(trainable)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))

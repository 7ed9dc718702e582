"""Several rollouts a row: the same learning as one a row, from fewer tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidfire_jax import init_state, make_optimizer, make_policy
from rapidfire_jax.algorithms import online, tasks
from rapidfire_jax.algorithms.online import Rollouts
from rapidfire_jax.data.packing import SIZES, pack_rollouts
from tests.algorithms.bigram import config_of, plain
from tests.helpers.tiny import TINY, tiny_model

P, T = 5, 7
PROMPTS, RESPONSES = [2, 5, 1, 3, 4, 2, 5, 1], [7, 1, 2, 3, 1, 2, 4, 1]


def masks(prompts, responses):
    """Of prompts padded on the left with responses padded on the right, and of the responses."""
    column = np.arange(P)[None]
    mask_t = np.arange(T)[None] < np.array(responses)[:, None]
    return np.concatenate([column >= P - np.array(prompts)[:, None], mask_t], axis=1), mask_t


def rollouts(seed=0):
    mask, mask_t = masks(PROMPTS, RESPONSES)
    random = np.random.default_rng(seed)
    tokens = np.where(mask, random.integers(3, TINY.vocab_size, mask.shape), 0).astype(np.int32)
    number = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    rows = len(PROMPTS)
    ended = ~mask_t[:, -1]
    made = Rollouts(tokens, mask, mask_t, ended, number(rows, T) - 4, number(rows, T), score=number(rows))
    return jax.tree.map(jnp.asarray, made)


def of_rows(array, packing):
    """Rollout by rollout, what stands at their tokens in rows."""
    source, found = np.asarray(packing.source), {}
    for row, column in np.argwhere(source < len(PROMPTS) * (P + T)):
        found[int(source[row, column])] = array[row, column]
    return found


lengths = st.lists(st.tuples(st.integers(1, P), st.integers(1, T)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(lengths)
def test_every_token_has_one_place(lengths):
    mask, _ = masks(*zip(*lengths, strict=True))
    packing = pack_rollouts(mask)
    source, segments = np.asarray(packing.source), np.asarray(packing.segments)
    places = source[source < mask.size]
    assert sorted(places) == list(np.flatnonzero(mask))
    np.testing.assert_array_equal(segments > 0, source < mask.size)
    assert len(source) <= len(mask)
    for row, numbers in zip(
        source, segments, strict=True
    ):  # a segment is one rollout, from its first token to its last
        for number in range(1, numbers.max() + 1):
            own = row[numbers == number]
            assert len(set(own // mask.shape[1])) == 1 and (np.diff(own) == 1).all()
            assert len(own) == mask[own[0] // mask.shape[1]].sum()


def test_arrays_of_rollouts_in_rows_and_back():
    mask, mask_t = masks(PROMPTS, RESPONSES)
    packing = pack_rollouts(mask)
    array = np.random.default_rng(0).normal(size=mask_t.shape).astype(np.float32)
    spread = np.asarray(packing.spread(jnp.asarray(array)))
    assert spread.shape == (len(packing.source), P + T - 1) and len(packing.source) < len(PROMPTS)
    found = of_rows(np.pad(spread, ((0, 0), (1, 0))), packing)
    for b, t in np.argwhere(mask_t):
        assert found[b * (P + T) + P + t] == array[b, t]
    back = packing.gather(jnp.asarray(spread), jnp.asarray(mask_t))
    np.testing.assert_array_equal(back, np.where(mask_t, array, 0))


def test_sizes_are_few_and_multiples():
    found = {len(pack_rollouts(masks([P] * 16, [n] * 16)[0], parts=2).source) for n in range(1, T + 1)}
    found |= {len(pack_rollouts(masks([1] * 16, [n] * 16)[0], parts=2).source) for n in range(1, T + 1)}
    assert 1 < len(found) <= SIZES and all(size % 2 == 0 for size in found) and max(found) == 16


CASES = {
    "every weight": ("ppo", None, {}),
    "recomputed": ("ppo", 1, {"recompute": True, "bootstrap_truncated": True}),
    "KL in the loss": ("ppo", 2, {"kl_in": "loss", "epochs": 2}),
    "DAPO": ("grpo", 1, {"aggregation": "token", "recompute": True, "group_size": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_learning(case):
    name, layers, changes = CASES[case]
    algorithm, config = tasks()[name], config_of(name, **{"epochs": 1} | changes)
    hparams = jax.tree.map(jnp.float32, plain(name))
    lora = None if layers is None else {"rank": 2, "alpha": 4.0, "targets": "all-linear", "layers": layers}
    policy, frozen, trainable = make_policy(tiny_model(), jax.random.key(0), lora=lora)
    noise = lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape, w.dtype)  # noqa: E731
    optimizer = make_optimizer("adamw")
    state = init_state(frozen, jax.tree.map(noise, trainable), optimizer)
    learn = partial(
        online.learn,
        algorithm,
        apply=policy.apply,
        reference=policy.reference,
        encode=policy.encode,
        optimizer=optimizer,
    )
    apart = rollouts()
    packing = pack_rollouts(apart.attention_mask)
    assert len(packing.source) < len(PROMPTS)
    together = dataclasses.replace(apart, packing=packing)
    run = jax.jit(learn, static_argnames="config")
    packed = dataclasses.replace(config, packing=True)
    (one, metrics), (two, found) = (
        run(state, own, hparams, jax.random.key(1), config=c) for own, c in ((apart, config), (together, packed))
    )
    assert metrics.keys() == found.keys()
    for key in metrics:
        np.testing.assert_allclose(found[key], metrics[key], rtol=2e-4, atol=2e-5, err_msg=key)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, one.trainable, two.trainable)


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("ppo", {"packing": True}, "rollouts.packing=None"),
        ("grpo", {"packing": True, "aggregation": "sequence"}, "aggregation=token; found sequence"),
        ("grpo", {"packing": True, "aggregation": "token", "ratio_level": "sequence"}, "ratio_level=token"),
    ],
)
def test_what_cannot_be_packed(name, changes, problem):
    config, own = config_of(name, **changes), rollouts()
    if "None" not in problem:
        own = dataclasses.replace(own, packing=pack_rollouts(own.attention_mask))
    policy, frozen, trainable = make_policy(tiny_model(), jax.random.key(0), lora=None)
    optimizer = make_optimizer("adamw")
    rest = {"apply": policy.apply, "reference": policy.reference, "encode": policy.encode, "optimizer": optimizer}
    state = init_state(frozen, trainable, optimizer)
    with pytest.raises(ValueError, match=problem):
        online.learn(tasks()[name], state, own, plain(name), jax.random.key(0), config=config, **rest)

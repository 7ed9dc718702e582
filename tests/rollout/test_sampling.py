"""Distributions and log-probabilities of drawn tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rapidfire_jax.rollout.sampling import draw

LOGITS = jnp.log(jnp.array([0.4, 0.25, 0.2, 0.1, 0.05]))


def frequencies(**settings):
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens, logps = jax.vmap(lambda k: draw(k, LOGITS[None], **settings))(keys)
    np.testing.assert_allclose(logps[:, 0], LOGITS[tokens[:, 0]], rtol=1e-5)  # always of the whole distribution
    return np.bincount(np.asarray(tokens[:, 0]), minlength=5) / 4000


@pytest.mark.parametrize(
    ("settings", "support"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.66}, [0, 1, 2]),
        ({"top_p": 1e-9}, [0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 1]),
        ({"greedy": True}, [0]),
    ],
)
def test_support_and_proportions(settings, support):
    expected = np.zeros(5)
    expected[support] = np.exp(LOGITS)[np.array(support)]
    np.testing.assert_allclose(frequencies(**settings), expected / expected.sum(), atol=0.03)

"""Scalar heads: reward models in and out, critics of another size, value heads that come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rapidfire_jax import (
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForSequenceClassification,
    PPOBatch,
    PPOConfig,
    PPOHParams,
    init_state,
    make_optimizer,
    make_policy,
    ppo_step,
)
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.models.weights import parameters
from tests.helpers.tiny import padded_batch, tiny_model


def reward_model(seed=0, **changes) -> RewardModel:
    return RewardModel.from_causal(tiny_model(seed, **changes), jax.random.key(seed + 100))


def test_reward_is_the_head_at_the_last_real_token():
    model = reward_model()
    tokens, mask = padded_batch([3, 8, 5], 8)
    hidden = np.asarray(model.hidden(tokens, mask), np.float64)
    np.testing.assert_allclose(model(tokens, mask), hidden[:, -1] @ np.asarray(model.score[...]), rtol=1e-5, atol=1e-5)
    right = np.asarray(mask)[:, ::-1]
    shifted = np.zeros_like(tokens)
    for row, m in enumerate(np.asarray(mask)):
        shifted[row, : m.sum()] = np.asarray(tokens)[row, m]
    np.testing.assert_allclose(model(shifted, right), model(tokens, mask), rtol=1e-4, atol=1e-5)


def test_a_new_head_is_drawn_as_stiennon_et_al():
    scores = np.concatenate([reward_model(seed).score[...] for seed in range(40)])
    assert abs(scores.std() - (24 + 1) ** -0.5) < 0.02
    assert abs(scores.mean()) < 0.02


@pytest.mark.parametrize("tied", [False, True])
def test_reward_model_round_trip(tmp_path, tied):
    model = reward_model(tie_embeddings=tied)
    save_pretrained(model, tmp_path / "m")
    stored = load_file(tmp_path / "m/model.safetensors")
    assert stored["score.weight"].shape == (1, 24)
    assert "lm_head.weight" not in stored
    again = FlaxAutoModelForSequenceClassification.from_pretrained(str(tmp_path / "m"))
    for path, leaf in parameters(model).items():
        np.testing.assert_array_equal(parameters(again)[path], leaf, strict=True)


def test_each_kind_refuses_the_other(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "lm")
    save_pretrained(reward_model(), tmp_path / "rm")
    with pytest.raises(InputError, match=r"missing: score\.weight\n  unexpected: lm_head\.weight"):
        FlaxAutoModelForSequenceClassification.from_pretrained(str(tmp_path / "lm"))
    with pytest.raises(InputError, match=r"missing: lm_head\.weight\n  unexpected: score\.weight"):
        FlaxAutoModelForCausalLM.from_pretrained(str(tmp_path / "rm"))


def test_several_labels_are_refused(tmp_path):
    model = reward_model()
    save_pretrained(model, tmp_path / "m")
    from safetensors.numpy import save_file

    file = tmp_path / "m/model.safetensors"
    save_file(load_file(file) | {"score.weight": np.zeros((3, 24), np.float32)}, file)
    with pytest.raises(InputError, match=r"shape of score\.weight: found \[3, 24\], expected \[1, 24\]"):
        FlaxAutoModelForSequenceClassification.from_pretrained(str(tmp_path / "m"))


def test_value_head_comes_back(tmp_path):
    model = tiny_model()
    model.add_value_head()
    model.value_kernel[...] = jax.random.normal(jax.random.key(0), (24,))
    model.value_bias[...] = jnp.float32(0.5)
    save_pretrained(model, tmp_path / "m")
    again = FlaxAutoModelForCausalLM.from_pretrained(str(tmp_path / "m"))
    tokens, mask = padded_batch([4, 6], 6)
    values = again.value(again.hidden(tokens, mask))
    np.testing.assert_array_equal(values, model.value(model.hidden(tokens, mask)))
    policy, frozen, trainable = make_policy(
        again, jax.random.key(0), lora={"rank": 2, "alpha": 4.0, "targets": "q_proj"}
    )
    out = policy.apply(frozen, trainable, policy.encode(frozen, tokens, mask), 3, 1.0)
    np.testing.assert_allclose(out.v_t, np.asarray(values)[:, 2:5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0, "targets": "all-linear", "layers": 2}])
def test_separate_critic_of_another_size(lora):
    """Values are the critic's, log-probabilities the policy's, and a step trains both."""
    model, critic = tiny_model(), reward_model(7, hidden_size=16, num_layers=1, num_heads=2, head_dim=8)
    tokens, mask = padded_batch([5, 9], 9)
    expected_v = np.asarray(critic.value(critic.hidden(tokens, mask)))[:, 4:8]
    logps = jax.nn.log_softmax(model(tokens, mask))[:, 4:8]
    expected_logp = np.take_along_axis(np.asarray(logps), np.asarray(tokens)[:, 5:, None], 2)[..., 0]

    policy, frozen, trainable = make_policy(model, jax.random.key(0), lora=lora, critic=critic)
    inputs = policy.encode(frozen, tokens, mask)
    out = policy.apply(frozen, trainable, inputs, 4, 1.0)
    np.testing.assert_allclose(out.v_t, expected_v, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.logp_t, expected_logp, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(policy.reference(frozen, inputs, 4, 1.0), expected_logp, rtol=1e-4, atol=1e-5)

    optimizer = make_optimizer("sgd", max_grad_norm=None)
    advantages = jax.random.normal(jax.random.key(1), (2, 4))
    batch = PPOBatch(inputs, jnp.ones((2, 4), bool), out.logp_t, out.v_t, advantages, out.v_t + advantages)
    state, _ = ppo_step(
        init_state(frozen, trainable, optimizer),
        batch,
        PPOHParams(learning_rate=0.1, value_coef=1.0),
        apply=policy.apply,
        optimizer=optimizer,
        config=PPOConfig(),
    )
    for before, after in zip(trainable, state.trainable, strict=True):
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert any(jax.tree.leaves(changed))
    trained = policy.merge_critic(frozen, state.trainable)
    assert (trained.score[...] != critic_score(policy, frozen, trainable)).any()


def critic_score(policy, frozen, trainable):
    return policy.merge_critic(frozen, trainable).score[...]

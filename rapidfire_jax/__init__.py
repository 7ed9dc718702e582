"""RLHF in JAX: PPO as pure functions, with fused policy and value passes."""

from rapidfire_jax.algorithms.advantages import gae
from rapidfire_jax.algorithms.kl import kl_estimate
from rapidfire_jax.algorithms.optimizer import make_optimizer
from rapidfire_jax.algorithms.ppo import (
    PPOBatch,
    PPOConfig,
    PPOHParams,
    Rollouts,
    TrainState,
    init_state,
    ppo_iteration,
    ppo_learn,
    ppo_loss,
    ppo_step,
    ppo_targets,
    ppo_update,
)
from rapidfire_jax.models.auto import FlaxAutoModelForCausalLM
from rapidfire_jax.models.policy import Policy, make_policy
from rapidfire_jax.models.tokenizer import load_tokenizer
from rapidfire_jax.rollout.generate import Generation, SamplingConfig, generate

__all__ = [
    "FlaxAutoModelForCausalLM",
    "Generation",
    "PPOBatch",
    "PPOConfig",
    "PPOHParams",
    "Policy",
    "Rollouts",
    "SamplingConfig",
    "TrainState",
    "gae",
    "generate",
    "init_state",
    "kl_estimate",
    "load_tokenizer",
    "make_optimizer",
    "make_policy",
    "ppo_iteration",
    "ppo_learn",
    "ppo_loss",
    "ppo_step",
    "ppo_targets",
    "ppo_update",
]

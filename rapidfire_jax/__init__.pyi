"""What a researcher imports; `__init__.py` loads a module when its first name is used."""

from .algorithms.advantages import gae
from .algorithms.kl import kl_estimate
from .algorithms.optimizer import make_optimizer
from .algorithms.ppo import (
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
from .models.auto import FlaxAutoModelForCausalLM
from .models.policy import Policy, make_policy
from .models.tokenizer import load_tokenizer
from .rollout.generate import Generation, SamplingConfig, generate

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

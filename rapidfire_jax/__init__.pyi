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
from .models.auto import FlaxAutoModelForCausalLM, FlaxAutoModelForSequenceClassification
from .models.export import save_pretrained
from .models.heads import CausalLM, RewardModel
from .models.peft import load_adapter, save_adapter
from .models.policy import Policy, make_policy
from .models.tokenizer import load_tokenizer
from .rollout.generate import Generation, SamplingConfig, generate

__all__ = [
    "CausalLM",
    "FlaxAutoModelForCausalLM",
    "FlaxAutoModelForSequenceClassification",
    "Generation",
    "PPOBatch",
    "PPOConfig",
    "PPOHParams",
    "Policy",
    "RewardModel",
    "Rollouts",
    "SamplingConfig",
    "TrainState",
    "gae",
    "generate",
    "init_state",
    "kl_estimate",
    "load_adapter",
    "load_tokenizer",
    "make_optimizer",
    "make_policy",
    "ppo_iteration",
    "ppo_learn",
    "ppo_loss",
    "ppo_step",
    "ppo_targets",
    "ppo_update",
    "save_adapter",
    "save_pretrained",
]

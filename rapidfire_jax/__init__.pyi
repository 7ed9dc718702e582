"""What a researcher imports; `__init__.py` loads a module when its first name is used."""

from .algorithms.advantages import discounted_returns, gae, group_advantages, leave_one_out_advantages
from .algorithms.dpo import DPOConfig, DPOHParams, dpo_loss, dpo_step
from .algorithms.grpo import (
    GRPOConfig,
    GRPOHParams,
    grpo_iteration,
    grpo_learn,
    grpo_loss,
    grpo_step,
    grpo_targets,
    grpo_update,
)
from .algorithms.kl import adapt_kl_coef, kl_estimate
from .algorithms.loss_scale import LossScale, init_loss_scale
from .algorithms.offline import CompletionBatch, LabelledBatch, PreferenceBatch
from .algorithms.online import PolicyBatch, Rollouts
from .algorithms.optimizer import make_optimizer, separate_optimizers
from .algorithms.packing import Packing
from .algorithms.ppo import (
    PPOBatch,
    PPOConfig,
    PPOHParams,
    ppo_iteration,
    ppo_learn,
    ppo_loss,
    ppo_step,
    ppo_targets,
    ppo_update,
)
from .algorithms.reinforce_pp import (
    ReinforcePPConfig,
    ReinforcePPHParams,
    reinforce_pp_iteration,
    reinforce_pp_learn,
    reinforce_pp_loss,
    reinforce_pp_step,
    reinforce_pp_targets,
    reinforce_pp_update,
)
from .algorithms.reward_model import (
    RewardModelConfig,
    RewardModelHParams,
    classification_loss,
    preference_loss,
    reward_model_step,
)
from .algorithms.rloo import (
    RLOOConfig,
    RLOOHParams,
    rloo_iteration,
    rloo_learn,
    rloo_loss,
    rloo_step,
    rloo_targets,
    rloo_update,
)
from .algorithms.sft import SFTConfig, SFTHParams, sft_loss, sft_step
from .algorithms.surrogate import policy_loss, value_loss
from .algorithms.train_state import TrainState, init_state
from .data.packing import pack_rollouts
from .models.auto import FlaxAutoModelForCausalLM, FlaxAutoModelForSequenceClassification
from .models.export import save_pretrained
from .models.heads import CausalLM, RewardModel
from .models.peft import load_adapter, save_adapter
from .models.policy import Policy, make_policy
from .models.scorer import Scorer, make_scorer
from .models.tokenizer import load_tokenizer
from .rollout.generate import Generation, SamplingConfig, generate

__all__ = [
    "CausalLM",
    "CompletionBatch",
    "DPOConfig",
    "DPOHParams",
    "FlaxAutoModelForCausalLM",
    "FlaxAutoModelForSequenceClassification",
    "GRPOConfig",
    "GRPOHParams",
    "Generation",
    "LabelledBatch",
    "LossScale",
    "PPOBatch",
    "PPOConfig",
    "PPOHParams",
    "Packing",
    "Policy",
    "PolicyBatch",
    "PreferenceBatch",
    "RLOOConfig",
    "RLOOHParams",
    "ReinforcePPConfig",
    "ReinforcePPHParams",
    "RewardModel",
    "RewardModelConfig",
    "RewardModelHParams",
    "Rollouts",
    "SFTConfig",
    "SFTHParams",
    "SamplingConfig",
    "Scorer",
    "TrainState",
    "adapt_kl_coef",
    "classification_loss",
    "discounted_returns",
    "dpo_loss",
    "dpo_step",
    "gae",
    "generate",
    "group_advantages",
    "grpo_iteration",
    "grpo_learn",
    "grpo_loss",
    "grpo_step",
    "grpo_targets",
    "grpo_update",
    "init_loss_scale",
    "init_state",
    "kl_estimate",
    "leave_one_out_advantages",
    "load_adapter",
    "load_tokenizer",
    "make_optimizer",
    "make_policy",
    "make_scorer",
    "pack_rollouts",
    "policy_loss",
    "ppo_iteration",
    "ppo_learn",
    "ppo_loss",
    "ppo_step",
    "ppo_targets",
    "ppo_update",
    "preference_loss",
    "reinforce_pp_iteration",
    "reinforce_pp_learn",
    "reinforce_pp_loss",
    "reinforce_pp_step",
    "reinforce_pp_targets",
    "reinforce_pp_update",
    "reward_model_step",
    "rloo_iteration",
    "rloo_learn",
    "rloo_loss",
    "rloo_step",
    "rloo_targets",
    "rloo_update",
    "save_adapter",
    "save_pretrained",
    "separate_optimizers",
    "sft_loss",
    "sft_step",
    "value_loss",
]

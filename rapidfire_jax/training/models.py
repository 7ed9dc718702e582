"""From a configuration to a model ready to be trained, and from a trained one to a folder."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from rapidfire_jax.algorithms import tasks
from rapidfire_jax.algorithms.loss_scale import LossScale, init_loss_scale
from rapidfire_jax.algorithms.optimizer import make_optimizer, separate_optimizers
from rapidfire_jax.algorithms.train_state import TrainState, init_state
from rapidfire_jax.config import OnlineRunConfig, OptimizerConfig, RunConfig, with_dtypes
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.auto import FlaxAutoModelForSequenceClassification, load_language_model, load_model
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import CausalLM, RewardModel
from rapidfire_jax.models.peft import save_adapter
from rapidfire_jax.models.policy import Policy, make_policy
from rapidfire_jax.models.precision import hardware_dtype
from rapidfire_jax.models.scorer import Scorer, make_scorer
from rapidfire_jax.models.tokenizer import check_vocabulary, load_tokenizer, stop_ids
from rapidfire_jax.training.remat import preset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Trainee:
    """What a run trains: its static half, tokenizer, optimiser, and the state before the first iteration."""

    config: RunConfig
    model: Policy | Scorer
    tokenizer: "PreTrainedTokenizerFast"
    optimizer: optax.GradientTransformation
    state: TrainState
    context: int  # longest sequence the model takes, in tokens

    def export(self, state: TrainState, folder: Path) -> None:
        """Writes the model as a Hugging Face folder (adapters merged), its adapter and a separate critic below it."""
        config, name = self.config, self.config.model.name
        model = self.model.merge(state.frozen, state.trainable)
        eos_ids = stop_ids(name, self.tokenizer) if isinstance(model, CausalLM) else ()
        save_pretrained(model, folder, self.tokenizer, eos_ids=eos_ids)
        if config.adapter.type == "lora" and config.model.adapter is None:
            save_adapter(model, folder / "adapter", base_model_name=name, rslora=config.adapter.rslora)
        if isinstance(self.model, Policy):
            critic = self.model.merge_critic(state.frozen, state.trainable)
            if critic is not None:
                save_pretrained(critic, folder / "critic", self.tokenizer)


def run_keys(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random keys of a run: for what is added to the model, for training, for evaluation."""
    model, training, evaluation = jax.random.split(jax.random.key(seed), 3)
    return model, training, evaluation


def load_trainee(config: RunConfig) -> Trainee:
    """Loads and prepares what `config` trains. Where it computes in float16, the loss is scaled.

    Raises:
      InputError: a model or tokenizer that cannot be loaded, or that do not belong together; see `prepare`.
    """
    config = with_dtypes(config, hardware_dtype())
    algorithm, name = tasks()[config.task], config.model.name
    weights = config.model.model_dump()
    tokenizer = load_tokenizer(name)
    critic: RewardModel | None = None
    if not algorithm.online and algorithm.model == "reward_model":
        model = load_model(**weights)
        if isinstance(model, CausalLM):
            model = RewardModel.from_causal(model, jax.random.fold_in(run_keys(config.seed)[0], 1))
    else:
        model = load_language_model(**weights)
    check_vocabulary(name, model.config.vocab_size, tokenizer)
    if isinstance(config, OnlineRunConfig) and algorithm.has_critic and config.critic.name is not None:
        critic_weights = config.critic.model_dump(exclude={"optimizer"})
        critic = FlaxAutoModelForSequenceClassification.from_pretrained(**critic_weights)
        check_vocabulary(config.critic.name, critic.config.vocab_size, tokenizer)
    context = model.config.max_positions
    half, optimizer, state = prepare(config, model, critic)
    return Trainee(config, half, tokenizer, optimizer, state, context)


def prepare(
    config: RunConfig, model: CausalLM | RewardModel, critic: RewardModel | None
) -> tuple[Policy | Scorer, optax.GradientTransformation, TrainState]:
    """What `config` trains, from the models it starts from: its static half, optimiser and first state.

    Under `jax.eval_shape` it tells the shapes of the state without any weights.

    Raises:
      InputError: a rounding of weights that are not there.
    """
    lora = config.adapter.model_dump(exclude={"type"}) if config.adapter.type == "lora" else None
    key, remat = run_keys(config.seed)[0], preset(config.memory)
    half: Policy | Scorer
    if isinstance(model, RewardModel):
        half, frozen, trainable = make_scorer(model, key, lora=lora, remat=remat)
        _check_rounding(config.optimizer, trainable)
        optimizer = _optimizer(config.optimizer)
        return half, optimizer, init_state(frozen, trainable, optimizer, _loss_scale(model))

    has_critic = isinstance(config, OnlineRunConfig) and tasks()[config.task].has_critic
    critic_optimizer = config.critic.optimizer if isinstance(config, OnlineRunConfig) and has_critic else None
    half, frozen, trainable = make_policy(model, key, lora=lora, critic=critic, value_head=has_critic, remat=remat)
    if critic_optimizer is None:
        _check_rounding(config.optimizer, trainable)
        optimizer = _optimizer(config.optimizer, half.is_critic if has_critic else None)
    else:
        of_critic = half.is_critic(trainable)
        for own, wanted in ((config.optimizer, False), (critic_optimizer, True)):
            pairs = zip(jax.tree.leaves(trainable), jax.tree.leaves(of_critic), strict=True)
            _check_rounding(own, [x for x, of in pairs if of == wanted])
        optimizer = separate_optimizers(_optimizer(config.optimizer), _optimizer(critic_optimizer), half.is_critic)
    return half, optimizer, init_state(frozen, trainable, optimizer, _loss_scale(model, critic))


def _loss_scale(*models: CausalLM | RewardModel | None) -> LossScale | None:
    computes_in = {model.compute_dtype.name for model in models if model is not None}
    return init_loss_scale() if "float16" in computes_in else None


def _check_rounding(config: OptimizerConfig, trainable: Any) -> None:
    is_coarse = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(trainable))
    if config.stochastic_rounding is not None and not is_coarse:
        raise InputError(
            f"optimizer.stochastic_rounding={str(config.stochastic_rounding).lower()}: nothing that is trained is "
            "bfloat16; use null, or adapter.type=none with model.dtype=bfloat16"
        )
    if is_coarse and config.name != "adamw_8bit":
        print(
            f"optimizer.name={config.name} rounds bfloat16 weights to nearest: steps below 1/512 of a weight are lost; "
            "adamw_8bit rounds stochastically, model.dtype=float32 with compute_dtype=bfloat16 keeps every bit",
            file=sys.stderr,
        )


def _optimizer(config: OptimizerConfig, is_critic: Callable[[Any], Any] | None = None) -> optax.GradientTransformation:
    return make_optimizer(
        config.name,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        is_critic=is_critic,
        stochastic_rounding=config.stochastic_rounding,
    )


def numbers_of(config: RunConfig, **others: float | None) -> Any:
    """The algorithm's hyperparameters from its section and from others, as float32 arrays.

    None of them is a constant of a compiled program then.
    """
    numbers = _settings(config, tasks()[config.task].hparams, others)
    return jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), numbers)


def static_of(config: RunConfig, **others: Any) -> Any:
    """The algorithm's static settings, from its section and from others."""
    return _settings(config, tasks()[config.task].config, others)


def _settings(config: RunConfig, cls: type, others: dict[str, Any]) -> Any:
    named = {field.name for field in dataclasses.fields(cls)}
    of_section = {name: value for name, value in dict(config.settings).items() if name in named}
    return cls(**of_section | {name: value for name, value in others.items() if name in named})

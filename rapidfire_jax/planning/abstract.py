"""The programs of a run and the shapes of their arguments, from its configuration alone."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rapidfire_jax.algorithms.train_state import TrainState
from rapidfire_jax.config import CriticConfig, OnlineRunConfig, RewardConfig, WeightsConfig, with_dtypes
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.decoder import Decoder, Precision
from rapidfire_jax.models.heads import CausalLM, RewardModel
from rapidfire_jax.models.policy import Policy
from rapidfire_jax.models.quantization import Formats, check_formats, quantized_shape
from rapidfire_jax.models.weights import assemble, shapes_of
from rapidfire_jax.planning.architectures import architecture
from rapidfire_jax.programs import Program
from rapidfire_jax.rewards.model import SCORE, widest
from rapidfire_jax.training.models import prepare
from rapidfire_jax.training.recipe import Recipe, recipe_of


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A run without its weights: what it would compile, and what lies in memory all along."""

    recipe: Recipe
    policy: Policy
    state: TrainState  # of shapes
    rewards: list[RewardModel]  # of shapes, judges among them

    def calls(self) -> dict[str, tuple[Program, tuple[Any, ...]]]:
        """Programs and their largest arguments by name."""
        programs = self.recipe.programs(self.policy)
        largest = self.recipe.largest(programs.rollout, self.state)
        found = {name: (getattr(programs, name), args) for name, args in largest.items()}
        neural = _neural(self.recipe.config)
        tokens = largest["learn"][1].tokens.shape[1]
        for i, (entry, model) in enumerate(zip(neural, self.rewards, strict=True)):
            rows = entry.batch_size, widest(tokens, entry.max_length or model.config.max_positions)
            name = "reward" if len(neural) == 1 else f"reward {i + 1}"
            shapes = (jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, bool))
            found[name] = Program(name, SCORE.function), (model, *shapes)
        return found

    def times(self) -> dict[str, int]:
        """How often an iteration calls each of them. Learning has the reference in it, unless that is called first."""
        config = self.recipe.config
        rows, rewards = config.rollout.batch_size, sum(entry.kind == "model" for entry in config.reward)
        found = {"rollout": 1, "reference": int(self.recipe.reference_first), "learn": 1}
        for i, entry in enumerate(neural := _neural(config)):
            name = "reward" if len(neural) == 1 else f"reward {i + 1}"
            found[name] = -(-rows // entry.batch_size) if i < rewards else 0  # judges are for the evaluation
        return found


def abstract_run(config: OnlineRunConfig, dtype: str) -> AbstractRun:
    """The run of a configuration on hardware that multiplies best in `dtype`.

    Raises:
      InputError: a model of which nothing is known, or settings that do not belong together.
    """
    if not isinstance(config, OnlineRunConfig):
        raise InputError(f"task {config.task}: only runs that learn from their own rollouts can be planned so far")
    config = with_dtypes(config, dtype)
    weights = _weights(CausalLM, config.model)
    critic = None if config.critic.name is None else _weights(RewardModel, config.critic)
    static: list[Any] = []

    def first_state(weights: Any, critic: Any) -> TrainState:
        half, optimizer, state = prepare(
            config, _model(CausalLM, config.model, weights), critic and _model(RewardModel, config.critic, critic)
        )
        static.extend((half, optimizer))
        return state

    state = jax.eval_shape(first_state, weights, critic)
    policy, optimizer = static
    rewards = [
        jax.eval_shape(partial(_model, RewardModel, entry), _weights(RewardModel, entry)) for entry in _neural(config)
    ]
    recipe = recipe_of(config, (0,), 0, optimizer)  # which token ends a response changes no size
    return AbstractRun(recipe, policy, state, rewards)


def _neural(config: OnlineRunConfig) -> list[RewardConfig]:
    """Rewards and judges that are models."""
    return [entry for entry in (*config.reward, *config.judge) if entry.kind == "model"]


def _name(entry: WeightsConfig | CriticConfig | RewardConfig) -> str:
    name = entry.model if isinstance(entry, RewardConfig) else entry.name
    assert name is not None
    return name


def _precision(entry: WeightsConfig | CriticConfig | RewardConfig) -> Precision:
    return Precision(entry.compute_dtype, "float32")


def _weights(kind: type[Decoder], entry: WeightsConfig | CriticConfig | RewardConfig) -> dict[str, Any]:
    """Shapes of the parameters by path."""
    found = shapes_of(kind, architecture(_name(entry)), _precision(entry))
    formats, dtype = Formats(entry.quantize, entry.quantize_vocabulary), entry.dtype
    check_formats(formats, _name(entry), found)
    assert dtype is not None
    return {path: _parameter(path, shape, dtype, formats.of(path)) for path, shape in found.items()}


def _parameter(path: str, shape: tuple[int, ...], dtype: str, format: str | None) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype) if format is None else quantized_shape(path, shape, format)


def _model[M: Decoder](kind: type[M], entry: WeightsConfig | CriticConfig | RewardConfig, weights: Any) -> M:
    return assemble(kind, architecture(_name(entry)), weights, _precision(entry))

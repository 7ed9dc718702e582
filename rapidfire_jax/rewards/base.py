"""From the `reward:` of a configuration to checked scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rapidfire_jax.config import RewardConfig
from rapidfire_jax.errors import InputError
from rapidfire_jax.rewards.functions import RewardFunction
from rapidfire_jax.rewards.model import NeuralReward
from rapidfire_jax.rewards.remote import RemoteReward
from rapidfire_jax.rewards.values import Values


@dataclass(frozen=True)
class Scores:
    """Rewards of one batch of B responses.

    A component that rewards tokens counts in `token_rewards` and not in `total`; its part in `components` is the sum
    over the tokens of a response.
    """

    total: np.ndarray  # float32 [B]: weighted sum of the components that give one number a response
    components: dict[str, np.ndarray]  # name -> float32 [B], unweighted
    token_rewards: list[np.ndarray] | None = None  # float32 [tokens of the response], one a response; weighted sum

    @property
    def overall(self) -> np.ndarray:
        """Everything that a response was given, float32 [B]: its total and the rewards of its tokens."""
        if self.token_rewards is None:
            return self.total
        return self.total + _sums(self.token_rewards)


class Reward(Protocol):
    """What `load_reward` returns."""

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        columns: Mapping[str, Sequence[Any]],
        response_tokens: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        """Scores a batch; without `response_tokens`, the token ids of each response, no token can be rewarded."""


type Component = Callable[[list[str], list[str], Mapping[str, Sequence[Any]], Sequence[Sequence[int]] | None], Values]


def load_reward(configs: Sequence[RewardConfig], *, special_tokens: Sequence[str] = ()) -> Reward:
    """Finds the functions, loads the models, and returns `reward(prompts, responses, columns, response_tokens)`.

    A function is called as `function(prompts, responses, **columns, **args)` and returns one finite number a response,
    or for every response a list of one finite number a token. It gets those columns of the data that its signature
    names, or all of them if it takes `**kwargs`, and the token ids if it names `response_tokens`; where `args` and a
    column share a name, it gets the one of `args`. Modules in the working directory are found as well.

    Args:
      configs: one entry a component.
      special_tokens: those of the policy's tokenizer, as texts; a reward model does not read those that it does not
        know.

    Raises:
      InputError: a module, function, argument, model or environment variable that does not exist, or a name given
        twice; when called, a reward that fails, lacks an argument, or returns something else than finite numbers.
    """
    names = _names(configs)
    components = {name: _load(config, special_tokens) for name, config in zip(names, configs, strict=True)}
    weights = {name: config.weight for name, config in zip(names, configs, strict=True)}

    def reward(
        prompts: list[str],
        responses: list[str],
        columns: Mapping[str, Sequence[Any]],
        response_tokens: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        parts = {name: score(prompts, responses, columns, response_tokens) for name, score in components.items()}
        of_responses: list[np.ndarray] = [
            weights[name] * part for name, part in parts.items() if isinstance(part, np.ndarray)
        ]
        of_tokens = [[weights[name] * row for row in part] for name, part in parts.items() if isinstance(part, list)]
        return Scores(
            total=np.sum([np.zeros(len(responses), np.float32), *of_responses], axis=0, dtype=np.float32),
            components={name: _sums(part) if isinstance(part, list) else part for name, part in parts.items()},
            token_rewards=_add(of_tokens) if of_tokens else None,
        )

    return reward


def _load(config: RewardConfig, special_tokens: Sequence[str]) -> Component:
    match config.kind:
        case "function":
            return RewardFunction.load(config)
        case "model":
            return NeuralReward.load(config, special_tokens)
    return RemoteReward.load(config)


def _add(parts: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.sum(rows, axis=0, dtype=np.float32) for rows in zip(*parts, strict=True)]


def _sums(rows: list[np.ndarray]) -> np.ndarray:
    return np.array([row.sum() for row in rows], np.float32)


def _names(configs: Sequence[RewardConfig]) -> list[str]:
    """Distinct names of the components: of those that were not given one, a second `f` is called `f_2`."""
    given = [config.name for config in configs if config.name is not None]
    for name in given:
        if given.count(name) > 1:
            raise InputError(f"reward: {given.count(name)} components have the name {name!r}; give each its own")
    names: list[str] = []
    for config in configs:
        default = config.function.partition(":")[2] if config.function is not None else config.kind
        taken = {*names, *given}
        others = (f"{default}_{number}" for number in range(2, len(configs) + 2))
        names.append(config.name or next(name for name in (default, *others) if name not in taken))
    return names

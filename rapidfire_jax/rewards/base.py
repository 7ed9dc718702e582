"""From `package.module:function` in a configuration to checked scores."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rapidfire_jax.config import RewardConfig
from rapidfire_jax.errors import InputError


@dataclass(frozen=True)
class Scores:
    """Rewards of one batch: the weighted sum and the unweighted parts, each float32 [B]."""

    total: np.ndarray
    components: dict[str, np.ndarray]


Reward = Callable[[list[str], list[str], Mapping[str, Sequence[Any]]], Scores]


def load_reward(configs: tuple[RewardConfig, ...]) -> Reward:
    """Looks the functions up and returns `reward(prompts, responses, columns) -> Scores`.

    Each function is called as `function(prompts, responses, **columns, **args)` and returns one finite number a
    response. It gets those columns of the data that its signature names, or all of them if it takes `**kwargs`; where
    `args` and a column share a name, it gets the one of `args`. Modules in the working directory are found as well.

    Raises:
      InputError: a module, function or argument that does not exist; when called, a function that raises, lacks an
        argument, or returns something else than one finite number a response.
    """
    functions = [_Function.load(config) for config in configs]
    names = _names([config.function.partition(":")[2] for config in configs])

    def reward(prompts: list[str], responses: list[str], columns: Mapping[str, Sequence[Any]]) -> Scores:
        components = {
            name: function(prompts, responses, columns) for name, function in zip(names, functions, strict=True)
        }
        weighted = [config.weight * part for config, part in zip(configs, components.values(), strict=True)]
        return Scores(np.sum(weighted, axis=0, dtype=np.float32), components)

    return reward


@dataclass(frozen=True)
class _Function:
    """One reward function, its arguments bound and its values checked."""

    name: str
    call: Callable[..., Any]
    signature: inspect.Signature
    args: dict[str, Any]

    @classmethod
    def load(cls, config: RewardConfig) -> "_Function":
        call = _find(config.function)
        try:
            signature = inspect.signature(call)
            signature.bind_partial([], [])
        except (TypeError, ValueError):
            raise InputError(f"reward {config.function}: does not take (prompts, responses, ...)") from None
        function = cls(config.function, call, signature, config.args)
        for name in config.args:
            if not function._takes(name):
                known = function._keywords()
                raise InputError(f"reward {config.function}: no argument {name!r}; {_hint(name, known, 'it takes')}")
        return function

    def __call__(self, prompts: list[str], responses: list[str], columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
        keywords = {name: values for name, values in columns.items() if self._takes(name)} | self.args
        try:
            self.signature.bind(prompts, responses, **keywords)
        except TypeError as error:
            raise InputError(
                f"reward {self.name}: {error}, neither in reward.args nor a column of the data "
                f"({', '.join(map(repr, columns)) or 'it has none'})"
            ) from None
        try:
            values = self.call(prompts, responses, **keywords)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
        return self._check(values, len(responses))

    def _keywords(self) -> list[str]:
        """Parameters that can be given by name, without those for prompts and responses."""
        parameters = list(self.signature.parameters.values())
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return [p.name for p in named if p not in positional[:2]]

    def _takes(self, name: str) -> bool:
        parameters = self.signature.parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return name in self._keywords() or (takes_all and name not in parameters)

    def _check(self, values: Any, count: int) -> np.ndarray:
        try:
            array = np.asarray(values)
        except Exception as error:
            raise InputError(f"reward {self.name} returned {type(values).__name__}, not numbers: {error}") from error
        if array.shape != (count,):
            found = f"shape {array.shape}" if array.shape else f"{values!r:.100}"
            raise InputError(f"reward {self.name} returned {found}; one number for each of {count} responses is wanted")
        if not np.can_cast(array.dtype, np.float64, "same_kind"):
            row = next((i for i, v in enumerate(values) if not isinstance(v, int | float | np.number)), 0)
            raise InputError(f"reward {self.name}: row {row}: {values[row]!r} is not a number")
        with np.errstate(over="ignore"):
            scores = array.astype(np.float32)
        for bad in np.flatnonzero(~np.isfinite(scores)).tolist():
            raise InputError(f"reward {self.name}: row {bad}: {array[bad]} is not a finite float32")
        return scores


def _find(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"reward {name}: cannot import {module_name!r} (working directory {os.getcwd()}): "
            f"{type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function) or isinstance(function, type):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise InputError(f"reward {name}: no function {function_name!r}; {_hint(function_name, known, 'it has')}")
    return function


def _hint(name: str, known: list[str], otherwise: str) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {nearest[0]!r}?" if nearest else f"{otherwise} {', '.join(map(repr, known)) or 'none'}"


def _names(names: list[str]) -> list[str]:
    """Distinct names: a second `f` is called `f_2`."""
    return [name if (n := names[:i].count(name)) == 0 else f"{name}_{n + 1}" for i, name in enumerate(names)]

"""Rewards that are Python functions, named `package.module:function`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfire_jax.config import RewardConfig
from rapidfire_jax.config.functions import find_function, nearest
from rapidfire_jax.errors import InputError
from rapidfire_jax.rewards.values import Values, check_values

TOKENS = "response_tokens"


@dataclass(frozen=True)
class RewardFunction:
    """One reward function, its arguments bound and its values checked."""

    name: str
    call: Callable[..., Any]
    signature: inspect.Signature
    args: dict[str, Any]

    @classmethod
    def load(cls, config: RewardConfig) -> "RewardFunction":
        """Finds the function and checks its arguments; see `rapidfire_jax.rewards.base.load_reward`."""
        name = config.function
        assert name is not None
        call = find_function(name, f"reward {name}")
        try:
            signature = inspect.signature(call)
            signature.bind_partial([], [])
        except (TypeError, ValueError):
            raise InputError(f"reward {name}: does not take (prompts, responses, ...)") from None
        function = cls(name, call, signature, config.args)
        for argument in config.args:
            if not function._takes(argument):
                known = function._keywords()
                raise InputError(f"reward {name}: no argument {argument!r}; {nearest(argument, known, 'it takes')}")
        return function

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        columns: Mapping[str, Sequence[Any]],
        response_tokens: Sequence[Sequence[int]] | None = None,
    ) -> Values:
        """One number a response, or for every response one a token; see `check_values`."""
        keywords = {name: values for name, values in columns.items() if name != TOKENS and self._takes(name)}
        if TOKENS in self._keywords() and response_tokens is not None:
            keywords[TOKENS] = [list(ids) for ids in response_tokens]
        keywords |= self.args
        if self._needs_tokens and TOKENS not in keywords:
            raise InputError(f"reward {self.name}: takes {TOKENS}, and no response tokens are known here")
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
        return check_values(f"reward {self.name}", values, response_tokens, len(responses))

    @property
    def _needs_tokens(self) -> bool:
        parameter = self.signature.parameters.get(TOKENS)
        return TOKENS in self._keywords() and parameter is not None and parameter.default is parameter.empty

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

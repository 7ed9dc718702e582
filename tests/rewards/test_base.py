"""Composition of rewards, and what is said about functions that cannot be used."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rapidfire_jax.config import RewardConfig
from rapidfire_jax.errors import InputError
from rapidfire_jax.rewards.base import Scores, load_reward

MODULE = """
import numpy as np

def length(prompts, responses):
    return [len(r) for r in responses]

def match(prompts, responses, answer, *, bonus=1.0):
    return np.array([bonus * (r == a) for r, a in zip(responses, answer)])

def everything(prompts, responses, **columns):
    seen.append(columns)
    return [0.0] * len(responses)

def constant(p, r, value=None):
    return value

def tokens(prompts, responses, response_tokens, *, scale=1.0):
    return [[scale * t for t in ids] for ids in response_tokens]

def optional(prompts, responses, response_tokens=None):
    return [len(ids) if type(ids) is list else 0 for ids in response_tokens or "abc"]

def broken(prompts, responses):
    raise KeyError("lost")

def prompts_only(prompts):
    return []

class Judge:
    pass

seen = []
"""


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "half_written.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_rewards", "half_written"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def score(*configs: dict[str, Any], tokens: Any = None, **columns: Any) -> Scores:
    reward = load_reward(tuple(RewardConfig(**{"function": "my_rewards:length"} | config) for config in configs))
    return reward(["p", "q", "r"], ["", "ab", "c"], columns, tokens)


def constant(value: Any, tokens: Any = None) -> Scores:
    return score({"function": "my_rewards:constant", "args": {"value": value}}, tokens=tokens)


def test_weighted_sum() -> None:
    scores = score(
        {"weight": 0.5},
        {"function": "my_rewards:match", "args": {"bonus": 4.0}, "weight": -2.0},
        {"weight": 1.0},
        answer=("x", "ab", "c"),
    )
    length, match = np.array([0, 2, 1]), np.array([0, 4, 4])
    assert list(scores.components) == ["length", "match", "length_2"]
    np.testing.assert_array_equal(scores.components["length"], length)
    np.testing.assert_array_equal(scores.components["match"], match)
    np.testing.assert_array_equal(scores.total, 0.5 * length - 2.0 * match + length)
    assert {part.dtype for part in (scores.total, *scores.components.values())} == {np.dtype(np.float32)}


def test_a_function_gets_the_columns_it_takes() -> None:
    columns = {"answer": ("x", "y", "z"), "source": ("a", "b", "c"), "prompts": ("1", "2", "3")}
    score({}, **columns)
    score({"function": "my_rewards:everything", "args": {"extra": 1, "source": "mine"}}, **columns)
    assert sys.modules["my_rewards"].seen == [{"answer": ("x", "y", "z"), "source": "mine", "extra": 1}]


@pytest.mark.parametrize(
    "values", [(1, 2.5, True), np.array([1, 2.5, 1], np.float16), [np.float32(1), 2.5, np.int8(1)]]
)
def test_numbers_of_every_kind(values: Any) -> None:
    np.testing.assert_array_equal(constant(values).total, [1.0, 2.5, 1.0])


def test_jax_arrays() -> None:
    import jax.numpy as jnp

    np.testing.assert_array_equal(constant(jnp.array([1, 2.5, 1], jnp.bfloat16)).total, [1.0, 2.5, 1.0])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "returned None; one number for each of 3 responses"),
        (0.5, "returned 0.5; one number for each of 3 responses"),
        ([1.0, 2.0], r"returned shape \(2,\); one number for each of 3 responses"),
        ([[1.0], [2.0], [3.0]], "returned a list a response, but no response tokens are known here"),
        (np.ones((3, 2)), "returned a list a response, but no response tokens are known here"),
        ([[1.0], [2.0, 3.0], 1], "row 2 is 1, row 0 a list; return a number for every response, or"),
        ([1.0, "2", 3.0], "row 1: '2' is not a number"),
        ([1.0, 2.0, None], "row 2: None is not a number"),
        ([1j, 1.0, 1.0], "row 0: 1j is not a number"),
        ([0.0, float("nan"), 1.0], "row 1: nan is not a finite float32"),
        ([0.0, 1.0, float("-inf")], "row 2: -inf is not a finite float32"),
        ([1e39, 1.0, 1.0], r"row 0: 1e\+39 is not a finite float32"),
    ],
)
def test_bad_values(value: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"reward my_rewards:constant:? {said}"):
        constant(value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"function": "no_such_rewards:f"}, "cannot import 'no_such_rewards' .*No module named"),
        ({"function": "half_written:f"}, "cannot import 'half_written' .*no_such_module_anywhere"),
        ({"function": "my_rewards:lenght"}, "no function 'lenght'; did you mean 'length'?"),
        ({"function": "my_rewards:zzz"}, "no function 'zzz'; it has 'length', 'match'"),
        ({"function": "my_rewards:Judge"}, "no function 'Judge'"),
        ({"function": "my_rewards:seen"}, "no function 'seen'"),
        ({"function": "my_rewards:prompts_only"}, r"does not take \(prompts, responses"),
        ({"function": "my_rewards:match", "args": {"bonsu": 1}}, "no argument 'bonsu'; did you mean 'bonus'?"),
        ({"function": "my_rewards:length", "args": {"value": 1}}, "no argument 'value'; it takes none"),
        ({"function": "my_rewards:constant", "args": {"p": 1}}, "no argument 'p'; it takes 'value'"),
    ],
)
def test_found_when_loaded(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"reward {config['function']}: {said}"):
        load_reward((RewardConfig(**config),))


def test_found_when_called() -> None:
    with pytest.raises(InputError, match=r"my_rewards:match: missing a required argument: 'answer', .*\('label'\)"):
        score({"function": "my_rewards:match"}, label=("0", "1", "1"))
    with pytest.raises(InputError, match="reward my_rewards:broken raised KeyError: 'lost'") as caught:
        score({"function": "my_rewards:broken"})
    assert isinstance(caught.value.__cause__, KeyError)


TOKENS = ([], [5, 6], (7,))


def test_rewards_of_tokens() -> None:
    scores = score(
        {"weight": 0.5},
        {"function": "my_rewards:tokens", "weight": 2.0},
        {"function": "my_rewards:tokens", "args": {"scale": 10.0}, "weight": -1.0, "name": "tenfold"},
        tokens=TOKENS,
    )
    np.testing.assert_array_equal(scores.total, [0.0, 1.0, 0.5])
    assert list(scores.components) == ["length", "tokens", "tenfold"]
    np.testing.assert_array_equal(scores.components["tokens"], [0, 11, 7])
    np.testing.assert_array_equal(scores.components["tenfold"], [0, 110, 70])
    assert scores.token_rewards is not None
    for row, expected in zip(scores.token_rewards, ([], [-40.0, -48.0], [-56.0]), strict=True):
        np.testing.assert_array_equal(row, np.array(expected, np.float32), strict=True)
    np.testing.assert_array_equal(scores.overall, np.array([0, 1 - 88, 0.5 - 56], np.float32), strict=True)


def test_without_rewards_of_tokens() -> None:
    scores = score({})
    assert scores.token_rewards is None
    np.testing.assert_array_equal(scores.overall, scores.total)
    only = score({"function": "my_rewards:tokens"}, tokens=TOKENS)
    np.testing.assert_array_equal(only.total, np.zeros(3, np.float32), strict=True)
    np.testing.assert_array_equal(only.overall, [0, 11, 7])


def test_an_array_of_equal_rows() -> None:
    scores = constant(np.arange(6.0).reshape(3, 2), tokens=[[1, 2]] * 3)
    assert scores.token_rewards is not None
    np.testing.assert_array_equal(np.stack(scores.token_rewards), np.arange(6.0).reshape(3, 2))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([[], [1.0], [2.0]], r"row 1 returned shape \(1,\); one number for each of 2 response tokens is wanted"),
        ([[], [1.0, None], [2.0]], "row 1: token 1: None is not a number"),
        ([[], [1.0, 2.0], [float("nan")]], "row 2: token 0: nan is not a finite float32"),
        ([[], [1.0, [2.0]], [1.0]], "row 1 returned list, not numbers"),
        ([[], [1.0, 2.0]], "returned 2 lists; one for each of 3 responses is wanted"),
        ([0.0, [1.0, 2.0], [2.0]], r"row 0 is 0\.0, row 1 a list"),
    ],
)
def test_bad_values_of_tokens(value: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"reward my_rewards:constant:? {said}"):
        constant(value, tokens=TOKENS)


def test_the_parameter_for_tokens() -> None:
    np.testing.assert_array_equal(score({"function": "my_rewards:optional"}, tokens=TOKENS).total, [0, 2, 1])
    np.testing.assert_array_equal(score({"function": "my_rewards:optional"}).total, [0, 0, 0])
    with pytest.raises(InputError, match="my_rewards:tokens: takes response_tokens, and no response tokens are known"):
        score({"function": "my_rewards:tokens"}, response_tokens=("a", "b", "c"))
    score({"function": "my_rewards:everything"}, tokens=TOKENS)
    assert sys.modules["my_rewards"].seen == [{}]


def test_names_of_components() -> None:
    named = {"name": "length"}
    assert list(score({}, named, {}, {"name": "other"}).components) == ["length_2", "length", "length_3", "other"]
    with pytest.raises(InputError, match="2 components have the name 'length'"):
        score(named, {}, named)

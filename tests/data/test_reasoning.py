"""Generated problems keep what their scorer needs."""

import json
import sys
from typing import Any

import pytest

from rapidfire_jax.config.data import DataConfig
from rapidfire_jax.data.prompts import load_prompts
from rapidfire_jax.data.reasoning import INSTRUCTION, problems
from rapidfire_jax.errors import InputError


def test_problems_are_prompts_with_an_entry(tokenizer: Any) -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    args = {"name": "chain_sum", "size": 40, "seed": 3, "max_terms": 3}
    config = DataConfig(
        function="rapidfire_jax.data.reasoning:problems", args=args, train=(0.0, 0.7), held_out=(0.7, 1.0)
    )
    training, held_out = load_prompts(config, tokenizer, seed=0, held_out=4, max_new_tokens=8, context=512)
    scorer = reasoning_gym.create_dataset("chain_sum", size=40, seed=3, max_terms=3)
    for text, entry in zip(
        training.texts + held_out.texts, training.columns["entry"] + held_out.columns["entry"], strict=True
    ):
        problem = json.loads(entry)
        assert text == f"<s>{problem['question']}\n{INSTRUCTION}"
        assert scorer.score_answer(problem["answer"], problem) == 1.0
        assert scorer.score_answer("no", problem) < 0.5


def test_the_same_seed_gives_the_same_problems() -> None:
    pytest.importorskip("reasoning_gym")
    first, same, other = (list(problems("chain_sum", 5, seed, "")) for seed in (0, 0, 1))
    assert first == same != other
    assert first[0]["prompt"] == json.loads(first[0]["entry"])["question"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "sums"}, "no task 'sums'; reasoning-gym has ab, acre"),
        ({"name": "chain_sum", "terms": 3}, "chain_sum refuses .*'terms': 3.*: .*unexpected keyword argument 'terms'"),
        ({"name": "chain_sum", "min_terms": -1}, "chain_sum refuses .*: min_terms must be positive"),
    ],
)
def test_says_what_is_wrong(arguments: dict[str, Any], said: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(InputError, match=said):
        list(problems(**arguments))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"not installed; pip install 'rapidfire-jax\[reasoning\]'"):
        list(problems("chain_sum"))

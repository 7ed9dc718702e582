"""What the section `data:` accepts, and what it says otherwise."""

from typing import Any

import pydantic
import pytest

from rapidfire_jax.config.data import DataConfig


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give either path or function; found neither"),
        ({"path": "a", "function": "a:b"}, "give either path or function; found both"),
        ({"path": "a", "args": {"n": 1}}, "args={'n': 1} has no effect without function"),
        ({"function": "a:b", "split": "test"}, "split='test' has no effect with function"),
        ({"function": "a:b", "subset": "en"}, "subset='en' has no effect with function"),
        ({"function": "a.b"}, "should match pattern"),
        ({"path": "a", "shuffle_buffer": 10}, "shuffle_buffer=10 has no effect without streaming=true"),
        ({"path": "a", "columns": {"answer": "b"}}, "should be 'prompt', 'text', 'completion'"),
        ({"path": "a", "column": "b", "columns": {"prompt": "c"}}, "column='b' and columns.prompt='c' differ"),
        ({"path": "a", "format": "sft"}, "should be 'auto', 'prompt'"),
        ({"path": "a", "max_length": 0}, "greater than 0"),
        ({"path": "a", "train": (0.5, 0.5)}, r"train: \[0.5, 0.5\] is empty"),
        ({"path": "a", "train": (0.0, 0.96)}, "overlap"),
    ],
)
def test_says_what_is_wrong(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=said):
        DataConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "organisation/name@v1", "subset": "en", "split": "test", "streaming": True, "shuffle_buffer": 9},
        {"function": "a.b:c", "args": {"n": [1, 2]}, "columns": {"text": "body"}, "column": "body"},
        {"path": "a.csv", "format": "preference", "too_long": "drop", "unusable": "drop", "clean": False},
    ],
)
def test_comes_back_from_what_is_written_down(settings: dict[str, Any]) -> None:
    config = DataConfig(**settings)
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in config.model_dump(mode="json").items()}
    assert DataConfig(**lists) == config

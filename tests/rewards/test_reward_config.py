"""The `reward:` section: three kinds, each with its own settings."""

import re
from typing import Any

import pydantic
import pytest

from rapidfire_jax.config import RewardConfig

SMALLEST = ({"function": "a.b:c"}, {"model": "org/rm"}, {"url": "https://host:80/score?key=1"})
SETTINGS = (
    {"function": "a:b", "args": {"x": [1, {"y": None}]}, "weight": -2.0, "name": "brevity"},
    {"model": "rm", "dtype": "bfloat16", "compute_dtype": "float32", "max_length": 64, "append_eos": True},
    {"model": "rm", "text": "response", "batch_size": 3},
    {"model": "rm", "chat_template": True},
    {"url": "http://h", "timeout": 2.5, "retries": 0, "concurrency": 1, "batch_size": 2, "headers": {"A": "x ${B}"}},
)


@pytest.mark.parametrize("tree", [*SMALLEST, *SETTINGS])
def test_written_out_and_read_again(tree: dict[str, Any]) -> None:
    config = RewardConfig(**tree)
    assert {key: getattr(config, key) for key in tree} == tree
    dumped = config.model_dump(mode="json")
    assert config.kind in dumped
    assert len({"function", "model", "url"} & dumped.keys()) == 1
    assert RewardConfig.model_validate(dumped) == config


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({}, "give one of function, model and url; found none of them"),
        ({"weight": 2.0}, "give one of function, model and url; found none of them"),
        ({"function": "a:b", "url": "http://h"}, "give one of function, model and url; found function and url"),
        ({"function": "a:b", "timeout": 3.0}, "timeout is a setting of a reward by url, this one is by function"),
        ({"function": "a:b", "batch_size": 3}, "batch_size is a setting of a reward by model or url, this one is by f"),
        ({"url": "http://h", "args": {}}, "args is a setting of a reward by function, this one is by url"),
        ({"model": "m", "headers": {}}, "headers is a setting of a reward by url, this one is by model"),
        ({"model": "m", "chat_template": True, "text": "response"}, "text: response leaves the prompt out; drop one"),
        ({"function": "no_colon"}, "should match pattern"),
        ({"model": ""}, "at least 1 character"),
        ({"model": "m", "max_length": 0}, "greater than 0"),
        ({"model": "m", "dtype": "float64"}, "'float32', 'bfloat16' or 'float16'"),
        ({"url": "http://h", "timeout": 0.0}, "greater than 0"),
        ({"url": "http://h", "retries": -1}, "greater than or equal to 0"),
        ({"url": "host:80/score"}, r"write http://HOST\[:PORT\]/PATH"),
        ({"url": "ftp://h"}, "not an address"),
        ({"url": "http://h:99999"}, "not an address"),
        ({"url": "http://h/a b"}, "not an address"),
        ({"function": "a:b", "name": "two words"}, "should match pattern"),
        ({"function": "a:b", "weight": float("nan")}, "finite"),
    ],
)
def test_refused(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=said):
        RewardConfig(**tree)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"url": "http://me:s3cret@h"}, "holds a user name or password; send it in headers"),
        ({"headers": "s3cret"}, "give names and values, .* not a str"),
        ({"headers": {"A": ["s3cret"]}}, "A: the value is a list; give a text"),
        ({"headers": {"A": "s3cret\n"}}, "A: the value holds a character that no header can hold"),
        ({"headers": {"A": "s3cret ${B"}}, r"A: an environment variable is written \$\{NAME\}"),
        ({"headers": {"A b": "s3cret"}}, "'A b' is not the name of a header"),
    ],
)
def test_messages_hold_no_secrets(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        RewardConfig(**({"url": "http://h"} | tree))
    (error,) = caught.value.errors()
    assert error["type"] == "value_error"  # for which the configuration does not show what it found
    assert re.search(said, error["msg"])
    assert "s3cret" not in error["msg"]


def test_the_representation_holds_no_secrets() -> None:
    assert "s3cret" not in repr(RewardConfig(url="http://h", headers={"A": "s3cret"}))

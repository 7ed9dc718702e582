"""Functions of one algorithm from those that several share."""

import functools
from collections.abc import Callable
from typing import Any


def bind(function: Callable[..., Any], algorithm: Any, name: str) -> Callable[..., Any]:
    """`function(algorithm, ...)` as a function `name(...)` with the same documentation."""
    bound = functools.partial(function, algorithm)
    bound.__name__ = bound.__qualname__ = name  # type: ignore[attr-defined]
    bound.__doc__ = function.__doc__
    return bound

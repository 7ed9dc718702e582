"""Functions that a configuration names as `package.module:function`."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from rapidfire_jax.errors import InputError


def find_function(place: str, name: str) -> Callable[..., Any]:
    """The function at `place`; modules in the working directory are found as well.

    Args:
      place: `package.module:function`.
      name: what messages begin with.

    Raises:
      InputError: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = place.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"{name}: cannot import {module_name!r} (working directory {os.getcwd()}): {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function) or isinstance(function, type):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise InputError(f"{name}: no function {function_name!r}; {nearest(function_name, known, 'it has')}")
    return function


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """A hint for a name that is not known: the one that was probably meant, or all there are."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise} {', '.join(map(repr, known)) or 'none'}"

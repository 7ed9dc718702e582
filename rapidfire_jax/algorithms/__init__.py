"""Pure maths and pure steps. Takes arrays, never models.

A module here that defines `ALGORITHM` is a task: its name is what a configuration calls it by.
"""

import functools
import importlib
import pkgutil
from typing import Any


@functools.cache
def tasks() -> dict[str, Any]:
    """The algorithms of this package by the names of their modules."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module.ALGORITHM for name, module in modules.items() if hasattr(module, "ALGORITHM")}

"""Grids of test cases."""

from collections.abc import Iterable
from typing import Any

import pytest


def spread(cases: Iterable[Any], quick: int) -> list[Any]:
    """The cases: `quick` of them, evenly spread, run always, and the others with the long tests."""
    cases = list(cases)
    chosen = {i * len(cases) // quick for i in range(quick)}
    values = [case if type(case) is tuple else (case,) for case in cases]
    return [pytest.param(*value, marks=() if i in chosen else pytest.mark.slow) for i, value in enumerate(values)]

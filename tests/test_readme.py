"""The example of the README runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support_matrix import in_readme

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_example(capsys):
    code = re.search(r"```python\n(import jax.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})
    assert "'policy/ratio_max_deviation': 0.0" in capsys.readouterr().out


def test_support_matrix_is_that_of_the_tests():
    made = subprocess.run(
        [sys.executable, "-m", "tests.support_matrix"], cwd=README.parent, capture_output=True, text=True, check=True
    )
    assert made.stdout.strip() == in_readme().strip(), "run: python -m tests.support_matrix --write"

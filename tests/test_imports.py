"""Rooms import one way, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANKS = {
    "pallas_kernels": 0,
    "errors": 0,
    "programs": 0,
    "user_cache": 0,
    "models": 1,
    "algorithms": 1,
    "config": 2,
    "data": 3,
    "memory": 4,
    "rollout": 4,
    "rewards": 4,
    "training": 5,
    "doctor": 6,
    "planning": 6,
    "cli": 7,
}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "pallas_kernels" else parts[1]


def imports(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module] + [
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    ]


def test_imports_go_one_way():
    wrong, seen = [], 0
    for path in [*ROOT.glob("pallas_kernels/**/*.py"), *ROOT.glob("rapidfire_jax/**/*.py")]:
        here = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if here == "rapidfire_jax.__init__":
            continue
        for there in imports(path):
            if there.split(".")[0] not in ("rapidfire_jax", "pallas_kernels") or there == "rapidfire_jax":
                continue
            seen += 1
            if room(here) != room(there) and RANKS[room(here)] <= RANKS[room(there)]:
                wrong.append(f"{here} imports {there}")
    assert not wrong
    assert seen > 20


def test_the_package_imports_neither_torch_nor_scikit_learn():
    code = (
        "import sys; from rapidfire_jax import ppo_step, generate, gae; "
        "heavy = {'torch', 'sklearn', 'transformers', 'matplotlib', 'orbax'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

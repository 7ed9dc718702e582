"""Modes of the whole suite: no silent promotion of types or ranks, and programs that are compiled quickly and once."""

import os
import tempfile
from pathlib import Path

# Threads of XLA: the warpgroups of a simulated kernel wait for each other, and each needs one.
os.environ.setdefault("NPROC", "16")

import jax
import pytest

LEARNING = Path(__file__).parent / "learning"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests that differ in numbers only share their programs; a fresh folder a session, so that nothing old is loaded.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="rapidfire-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module():
    """Drops what a module compiled: a program keeps 20 of the 65,530 mappings of a process, and XLA crashes without."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def quick_compiler(request):
    """Programs of a few rows that run a few times: what XLA would gain by optimising them, it loses many times over.

    Tests of learning run theirs thousands of times.
    """
    jax.config.update("jax_disable_most_optimizations", not request.path.is_relative_to(LEARNING))

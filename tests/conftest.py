"""Strict modes for the whole suite: no silent type promotion, no silent rank promotion."""

import os
import tempfile

# Threads of XLA: the warpgroups of a simulated kernel wait for each other, and each needs one.
os.environ.setdefault("NPROC", "16")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Programs of a few rows that run a few times: what XLA would gain by optimising them, it loses many times over.
jax.config.update("jax_disable_most_optimizations", True)

# Tests that differ in numbers only share their programs; a fresh folder a session, so that nothing old is loaded.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="rapidfire-jax-tests-")
    os.environ["RAPIDFIRE_TEST_PROGRAMS"] = _programs.name
jax.config.update("jax_compilation_cache_dir", os.environ["RAPIDFIRE_TEST_PROGRAMS"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

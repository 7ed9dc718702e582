"""Strict modes for the whole suite: no silent type promotion, no silent rank promotion."""

import os
import tempfile

# Threads of XLA: the warpgroups of a simulated kernel wait for each other, and each needs one.
os.environ.setdefault("NPROC", "16")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Jobs that differ in numbers only share their programs; a fresh folder a session, so that nothing old is loaded.
_programs = tempfile.TemporaryDirectory(prefix="rapidfire-jax-tests-")
jax.config.update("jax_compilation_cache_dir", _programs.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

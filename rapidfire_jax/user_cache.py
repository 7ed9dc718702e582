"""What one run leaves for the next: `${XDG_CACHE_HOME:-~/.cache}/rapidfire-jax/`."""

import os
from pathlib import Path

PROGRAMS_BYTES = 5_000_000_000  # the least recently used go first


def cache_folder() -> Path:
    """The folder, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rapidfire-jax"


def keep_compiled_programs() -> None:
    """Has this process load programs that were compiled before, and keep those that it compiles.

    Nothing changes where JAX was told of a folder (`JAX_COMPILATION_CACHE_DIR`).
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
        jax.config.update("jax_compilation_cache_max_size", PROGRAMS_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

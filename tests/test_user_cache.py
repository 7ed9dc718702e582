"""What a second process finds of the first."""

import os
import subprocess
import sys

import pytest

# Its function takes about a second to compile: programs of less than a tenth are not kept.
PROGRAM = """
import jax, jax.numpy as jnp
from rapidfire_jax.user_cache import keep_compiled_programs

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
keep_compiled_programs()
x = jnp.ones((64, 64))
hits.clear()
def many(x):
    y = x
    for i in range(120):
        y = jnp.sort(jnp.sin(y @ x + i), axis=i % 2)
    return y
jax.jit(many)(x)
print(len(hits))
"""


@pytest.mark.parametrize("named", [False, True])
def test_programs_are_compiled_once(tmp_path, named):
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    folder = tmp_path / "cache" / "rapidfire-jax" / "programs"
    if named:
        folder = tmp_path / "mine"
        env["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def hits():
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert hits() == 0
    assert hits() == 1
    assert list(folder.iterdir()) and (named or not (tmp_path / "mine").exists())

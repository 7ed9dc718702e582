"""`generate` of this package as a worker of `benchmarks.rollout`."""

import importlib.metadata
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.protocol import Channel
from rapidfire_jax import FlaxAutoModelForCausalLM, SamplingConfig, generate


def main() -> None:
    """Rollouts until standard input ends: of all prompts at once, or so many rows at a time."""
    channel = Channel()
    settings, folder = channel.settings, Path(channel.settings["folder"])
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder / "policy"), dtype=settings["dtype"])
    prompts = jnp.asarray(np.load(folder / "prompts.npy"))
    rows, lanes = settings["rows"], settings["decode_batch_size"]
    at_once = rows if lanes is None else len(prompts)
    prompts = prompts[:rows] if settings["one_batch"] else prompts
    eos_ids = tuple(range(settings["eos_ids"]))
    config = SamplingConfig(max_new_tokens=settings["response"], eos_ids=eos_ids, decode_batch_size=lanes)
    run = jax.jit(generate, static_argnames="config")
    channel.tell(versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")))
    key = jax.random.key(0)
    while True:
        channel.wait()
        start, tokens = time.perf_counter(), 0
        for first in range(0, len(prompts), at_once):
            key, now = jax.random.split(key)
            batch = prompts[first : first + at_once]
            tokens += int(run(model, batch, jnp.ones(batch.shape, bool), now, config=config).mask_t.sum())
        channel.tell(seconds=time.perf_counter() - start, tokens=tokens)


if __name__ == "__main__":
    main()

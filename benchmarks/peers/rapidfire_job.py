"""A configured job of this package as a worker of `benchmarks.one_gpu`: the iterations of `rapidfire train`."""

import importlib.metadata

import jax

from benchmarks.peers.protocol import Channel
from rapidfire_jax.config import load_config
from rapidfire_jax.programs import give_back_memory_of_compiling, peak_bytes
from rapidfire_jax.training.online import OnlineJob
from rapidfire_jax.user_cache import keep_compiled_programs


def main() -> None:
    """Iterations until standard input ends."""
    channel = Channel()
    keep_compiled_programs()
    give_back_memory_of_compiling()
    job = OnlineJob(load_config(channel.settings["config"]))
    loaded = peak_bytes() / 1e6
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    trained = sum(x.size for x in jax.tree.leaves(job.state.trainable))
    channel.tell(versions=versions, trained=trained, device=jax.devices()[0].device_kind, loaded=loaded)
    iteration = 0
    while True:
        channel.wait()
        metrics = job.iterate(iteration)
        iteration += 1
        phases = {name: metrics[f"seconds/{name}"] for name in ("rollout", "reward", "learn")}
        channel.tell(
            **{
                "seconds": sum(phases.values()),
                "rollout s": phases["rollout"],
                "scoring s": phases["reward"],
                "update s": phases["learn"],
                "score": metrics["reward"],
                "kl": metrics["kl"],
                "entropy": metrics["policy/entropy"],
                "device peak MB": metrics["peak_bytes"] / 1e6,
            }
        )


if __name__ == "__main__":
    main()

"""PPO of this package as a worker of `benchmarks.end_to_end`: an iteration is one program, the reward model within.

The critic is a head on the policy's trunk. The program cannot say what its phases take.
"""

import functools
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.extend.core import ClosedJaxpr

from benchmarks.peers.protocol import Channel
from rapidfire_jax import (
    FlaxAutoModelForCausalLM,
    FlaxAutoModelForSequenceClassification,
    PPOConfig,
    PPOHParams,
    Rollouts,
    SamplingConfig,
    generate,
    init_state,
    make_optimizer,
    make_policy,
    ppo_iteration,
)
from rapidfire_jax.algorithms.train_state import TrainState
from rapidfire_jax.config import MemoryConfig
from rapidfire_jax.programs import give_back_memory_of_compiling
from rapidfire_jax.training.remat import preset


class Problem(NamedTuple):
    """A run."""

    state: TrainState  # before the first iteration
    iteration: Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]  # takes a key; donates the state
    traced: Callable[[], ClosedJaxpr]  # what an iteration computes


def problem(settings: dict[str, Any]) -> Problem:
    """What `benchmarks.end_to_end` has written to `settings["folder"]`, as one program."""
    folder = Path(settings["folder"])
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder / "policy"))
    reward = nnx.split(FlaxAutoModelForSequenceClassification.from_pretrained(str(folder / "reward")))
    remat = preset(MemoryConfig(remat=settings["remat"]))
    policy, frozen, trainable = make_policy(model, jax.random.key(0), lora=settings["lora"], remat=remat)
    del model
    optimizer = make_optimizer(settings["optimizer"])
    state = init_state(frozen, trainable, optimizer)
    del frozen, trainable
    sampling = SamplingConfig(max_new_tokens=settings["response"], eos_ids=())
    prompts = jnp.asarray(np.load(folder / "prompts.npy"))
    hparams = PPOHParams(
        learning_rate=settings["learning_rate"], temperature=settings["temperature"], kl_coef=settings["kl_coef"]
    )
    hparams = jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), hparams)
    config = PPOConfig(epochs=settings["epochs"], recompute=settings["recompute"])

    def sample(frozen, trainable, prompts, mask, key, temperature):
        out = generate(policy.merge(frozen, trainable), prompts, mask, key, temperature, config=sampling)
        return Rollouts(out.tokens, out.attention_mask, out.mask_t, out.ended, out.logp_t, out.v_t)

    @functools.partial(jax.jit, donate_argnames="state")
    def iteration(state, weights, prompts, hparams, key):
        scores = []

        def score(rollouts):
            scores.append(nnx.merge(reward[0], weights)(rollouts.tokens, rollouts.attention_mask))
            return scores[-1]

        state, metrics = ppo_iteration(
            state,
            (prompts, jnp.ones(prompts.shape, bool)),
            hparams,
            key,
            sample=sample,
            reward=score,
            apply=policy.apply,
            reference=policy.reference,
            encode=policy.encode,
            optimizer=optimizer,
            config=config,
        )
        return state, metrics | {"score_std": scores[0].std()}

    return Problem(
        state,
        lambda state, key: iteration(state, reward[1], prompts, hparams, key),
        lambda: iteration.trace(state, reward[1], prompts, hparams, jax.random.key(0)).jaxpr,
    )


def main() -> None:
    """Iterations until standard input ends."""
    channel = Channel()
    settings = channel.settings
    jax.config.update("jax_compilation_cache_dir", f"{settings['folder']}/programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    give_back_memory_of_compiling()
    state, iteration, _ = problem(settings)
    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    channel.tell(versions=versions, trained=trained)
    key = jax.random.key(settings["seed"])
    while True:
        channel.wait()
        start = time.perf_counter()
        key, now = jax.random.split(key)
        state, metrics = jax.block_until_ready(iteration(state, now))
        channel.tell(
            seconds=time.perf_counter() - start,
            score=float(metrics["reward"]),
            score_std=float(metrics["score_std"]),
            kl=float(metrics["kl"]),
            approx_kl=float(metrics["policy/approx_kl"]),
            entropy=float(metrics["policy/entropy"]),
        )


if __name__ == "__main__":
    main()

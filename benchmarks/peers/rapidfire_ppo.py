"""PPO of this package as a worker of `benchmarks.end_to_end`: an iteration is one program, the reward model within.

The critic is a head on the policy's trunk. The program cannot say what its phases take.
"""

import functools
import importlib.metadata
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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


def main() -> None:
    """Iterations until standard input ends."""
    channel = Channel()
    settings, folder = channel.settings, Path(channel.settings["folder"])
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder / "policy"))
    reward = nnx.split(FlaxAutoModelForSequenceClassification.from_pretrained(str(folder / "reward")))
    policy, frozen, trainable = make_policy(model, jax.random.key(0), lora=settings["lora"])
    del model
    optimizer = make_optimizer("adamw")
    state = init_state(frozen, trainable, optimizer)
    del frozen, trainable
    sampling = SamplingConfig(max_new_tokens=settings["response"], eos_ids=())
    prompts = jnp.asarray(np.load(folder / "prompts.npy"))
    hparams = PPOHParams(
        learning_rate=settings["learning_rate"], temperature=settings["temperature"], kl_coef=settings["kl_coef"]
    )
    hparams = jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), hparams)

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
            config=PPOConfig(epochs=settings["epochs"], recompute=settings["recompute"]),
        )
        return state, metrics | {"score_std": scores[0].std()}

    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    channel.tell(versions=versions, trained=trained)
    key = jax.random.key(settings["seed"])
    while True:
        channel.wait()
        start = time.perf_counter()
        key, now = jax.random.split(key)
        state, metrics = jax.block_until_ready(iteration(state, reward[1], prompts, hparams, now))
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

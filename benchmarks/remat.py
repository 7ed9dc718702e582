"""Plans of what is kept for the backward pass, on the CPU: memory as predicted and measured, and time, with presets.

    python -m benchmarks.remat [--quick]
    python -m benchmarks.remat --h100

One step of PPO on the policy of configs/quickstart.yaml with adapters on all 30 layers: 16 responses, 8 + 16 tokens,
float32. "MB" is what the compiler says of temporaries. A budget lies at a fraction of the way from everything computed
again to everything kept; times are medians of several, in turns. "identical" says whether the state after the step is
bit for bit that of a step that keeps everything. `--h100` prints what activations of an 8B layer cost there.
"""

import argparse
import statistics
import time
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.results import report
from pallas_kernels import hopper
from pallas_kernels.shape_specs import BATCH, LENGTH, MODELS, PROMPT
from rapidfire_jax import PPOBatch, PPOConfig, PPOHParams, ppo_step
from rapidfire_jax.config import MemoryConfig, load_config
from rapidfire_jax.memory.devices import GIB, find_device
from rapidfire_jax.memory.layer_costs import layer_costs
from rapidfire_jax.memory.remat import Choice
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.heads import CausalLM
from rapidfire_jax.models.policy import Parts, Policy, make_policy
from rapidfire_jax.models.remat import DOTS, FULL, Remat
from rapidfire_jax.training.models import load_trainee
from rapidfire_jax.training.remat import activations, fit_plan

PRESETS = {"none": None, "full": FULL, "dots": DOTS}
BUDGETS = (0.1, 0.25, 0.7)
ROWS, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 16


def problem() -> tuple[Policy, Any, tuple[Any, ...]]:
    """The policy, a function from it to its compiled step, and the arguments of that."""
    trainee = load_trainee(load_config("configs/quickstart.yaml", ["adapter.layers=null"]))
    policy, state = trainee.model, trainee.state
    assert isinstance(policy, Policy)
    # Adapters that do nothing yet would hide differences.
    noise = lambda w: w + 0.01 * jax.random.normal(jax.random.key(w.size), w.shape, w.dtype)  # noqa: E731
    state = type(state)(state.frozen, jax.tree.map(noise, state.trainable), state.opt_state, state.step, state.stats)
    tokens = jax.random.randint(jax.random.key(0), (ROWS, PROMPT_TOKENS + NEW_TOKENS), 3, 40000)
    mask = jnp.arange(tokens.shape[1])[None] >= jnp.arange(ROWS)[:, None] % PROMPT_TOKENS
    numbers = [jax.random.normal(key, (ROWS, NEW_TOKENS)) for key in jax.random.split(jax.random.key(1), 4)]
    inputs = jax.jit(policy.encode)(state.frozen, tokens, mask)
    batch = PPOBatch(inputs, mask[:, -NEW_TOKENS:], *numbers)

    @cache
    def program(policy: Policy) -> Any:
        return jax.jit(partial(ppo_step, apply=policy.apply, optimizer=trainee.optimizer, config=PPOConfig()))

    return policy, program, (state, batch, PPOHParams(learning_rate=jnp.float32(1e-3)))


def seconds(step: Any, args: tuple[Any, ...]) -> float:
    """Of one call."""
    began = time.perf_counter()
    jax.block_until_ready(step(*args))
    return time.perf_counter() - began


def told(remat: Remat | None) -> str:
    """A plan in few words."""
    if remat is None:
        return "everything"
    kept = [f"{group.layers or 'rest'}: {', '.join(group.keep) or '-'}" for group in remat.groups]
    return "; ".join(kept)


def compare(repeats: int) -> list[dict[str, Any]]:
    """A row for each preset and each budget."""
    policy, program, args = problem()
    steps = {name: program(_with(policy, remat)).lower(*args).compile() for name, remat in PRESETS.items()}
    temporaries = {name: step.memory_analysis().temp_size_in_bytes for name, step in steps.items()}
    rows: dict[str, dict[str, Any]] = {
        name: {"budget MB": None, "plan": name, "predicted MB": None, "MB": temporaries[name] / 1e6} for name in PRESETS
    }
    for share in BUDGETS:
        budget = temporaries["full"] + share * (temporaries["none"] - temporaries["full"])
        memory = MemoryConfig(remat="auto", budget_gb=budget / GIB)
        fitted_policy, fitted = fit_plan(policy, program, args, memory)
        name = f"auto {share}"
        steps[name] = program(fitted_policy).lower(*args).compile()
        rows[name] = {
            "budget MB": budget / 1e6,
            "plan": told(fitted.choices[0].remat),
            "predicted MB": fitted.predicted / 1e6,
            "MB": fitted.measured / 1e6,
        }
    states = {name: jax.tree.leaves(step(*args)[0]) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, args))
    for name, row in rows.items():
        row["s"] = statistics.median(times[name])
        row["identical"] = all(map(np.array_equal, states[name], states["none"]))
        fitting = [
            statistics.median(times[preset])
            for preset in PRESETS
            if row["budget MB"] is not None and temporaries[preset] / 1e6 <= row["budget MB"]
        ]
        row["s of best preset"] = min(fitting, default=None)
        row["MB / predicted"] = None if row["predicted MB"] is None else row["MB"] / row["predicted MB"]
    return [{"what": name} | row for name, row in rows.items()]


def _with(policy: Policy, remat: Remat | None) -> Policy:
    return Policy(policy.graphdefs, policy.reference_graphdefs, policy.full, Parts(remat))


def h100() -> list[dict[str, Any]]:
    """Activations of an 8B layer in a step of PPO for an H100, with LoRA of rank 16 on every projection."""
    sizes = MODELS["8b"]
    config = DecoderConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn,
        num_layers=32,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_positions=8192,
    )
    tokens, mask = jnp.zeros((BATCH, LENGTH), jnp.int32), jnp.ones((BATCH, LENGTH), bool)
    lora = {"rank": 16, "alpha": 32.0, "targets": "all-linear"}
    halves: list[Policy] = []

    def weights() -> Any:
        model = CausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        policy, frozen, trainable = make_policy(model, jax.random.key(0), lora=lora, remat=FULL)
        halves.append(policy)
        return frozen, trainable

    frozen, trainable = jax.eval_shape(weights)
    (policy,) = halves

    def loss(trainable: Any, frozen: Any) -> jax.Array:
        inputs = policy.encode(frozen, tokens, mask)
        return policy.apply(frozen, trainable, inputs, LENGTH - PROMPT, 1.0).logp_t.sum()

    with jax.sharding.use_abstract_mesh(hopper.abstract_mesh()):
        gradient = jax.jit(jax.grad(loss)).trace(trainable, frozen).jaxpr
    costs = layer_costs(gradient, find_device("h100-80gb"))
    return activations(costs, Choice(FULL, 0, 0, 0.0, 0.0))


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--h100", action="store_true", help="costs of an 8B layer on an H100; runs nothing")
    args = parser.parse_args()
    if args.h100:
        return report("remat_h100", h100())
    report("remat", compare(2 if args.quick else 5))


if __name__ == "__main__":
    main()

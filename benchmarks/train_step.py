"""A step of PPO and a step of decoding as fractions of what this machine can do, measured in the same run.

    python -m benchmarks.train_step [--quick] [--json]

Update: one step of `ppo_step` on the shapes of `benchmarks.end_to_end`, float32, every weight or LoRA of rank 16 on all
linear layers. It counts 6 FLOPs for each trained weight and token and 4 for each frozen one, of the head for response
tokens only, of the last layer behind its attention for these and the one before, since nothing else is computed;
attention, norms, losses and the optimiser count nothing. The limit is the rate of float32 products of [2048, 2048]
matrices.

Decoding: a token for every row, from the difference between rollouts of full length and of one token. Its floor is the
larger of two: bytes of the weights over the bandwidth of a copy of 256 MB (read and written), and 2 FLOPs a weight and
row over the rate of products of as many rows with weights of the model's width that no cache holds, in the better of
two orders.

Rates and steps are measured in turns; figures are medians.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.end_to_end import LORA, SHAPES, Shape
from benchmarks.results import append, command_line, tell
from rapidfire_jax import (
    PPOBatch,
    PPOConfig,
    PPOHParams,
    SamplingConfig,
    generate,
    init_state,
    make_optimizer,
    make_policy,
    ppo_step,
)
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.heads import CausalLM
from rapidfire_jax.models.products import matmul_transposed

SQUARE, COPIED, WIDE = 2048, 2**26, 16 * 2**20  # side, floats, weights


def model_of(shape: Shape) -> CausalLM:
    """Random weights."""
    D, N = shape.width, shape.heads
    config = DecoderConfig(shape.vocabulary, D, 4 * D, shape.layers, N, N, D // N, shape.prompt + shape.response)
    return CausalLM(config, rngs=nnx.Rngs(0))


def seconds(function: Callable[..., Any], *args: Any) -> float:
    """Of one call."""
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def in_turns(calls: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """Medians, after a call of each that does not count."""
    for call in calls.values():
        call()
    taken = {name: list[float]() for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            taken[name].append(call())
    return {name: statistics.median(times) for name, times in taken.items()}


def update(shape: Shape, lora: dict[str, Any] | None, turns: int) -> dict[str, Any]:
    """A step of `ppo_step` against square products."""
    model = model_of(shape)
    table = shape.vocabulary * shape.width
    policy, frozen, trainable = make_policy(model, jax.random.key(0), lora=lora)
    optimizer = make_optimizer("adamw")
    state = init_state(frozen, trainable, optimizer)
    tokens = jax.random.randint(jax.random.key(1), (shape.rows, shape.prompt + shape.response), 0, shape.vocabulary)
    mask = jnp.ones(tokens.shape, bool)
    numbers = [jax.random.normal(key, (shape.rows, shape.response)) for key in jax.random.split(jax.random.key(2), 4)]
    batch = PPOBatch(jax.jit(policy.encode)(frozen, tokens, mask), mask[:, -shape.response :], *numbers)
    hparams = PPOHParams(learning_rate=jnp.float32(1e-5))
    step = jax.jit(partial(ppo_step, apply=policy.apply, optimizer=optimizer, config=PPOConfig()))

    base = sum(x.size for x in jax.tree.leaves(frozen.policy)) - 2 * table
    trained = base if lora is None else sum(x.size for x in jax.tree.leaves(trainable.policy))
    head = (6 if lora is None else 4) * table * shape.rows * shape.response
    D, F = shape.width, 4 * shape.width
    behind = D * D + 3 * D * F  # weights of a layer behind its attention
    unread = 6 * behind if lora is None else 4 * behind + 6 * lora["rank"] * (2 * D + 3 * (D + F))
    flops = (6 * trained + (0 if lora is None else 4 * base)) * tokens.size + head
    flops -= unread * shape.rows * (shape.prompt - 1)
    square = jax.random.normal(jax.random.key(3), (SQUARE, SQUARE))
    product = jax.jit(lambda a: a @ a)
    found = in_turns(
        {"step": lambda: seconds(step, state, batch, hparams), "product": lambda: seconds(product, square)}, turns
    )
    rate, limit = flops / found["step"], 2 * SQUARE**3 / found["product"]
    what = "update, every weight" if lora is None else "update, LoRA"
    return _row(shape, what, found["step"], rate, limit, rate / limit)


def decoding(shape: Shape, turns: int) -> dict[str, Any]:
    """A token for every row against the larger floor."""
    model, B = model_of(shape), shape.rows
    weights = sum(x.size for x in jax.tree.leaves(nnx.state(model))) - shape.vocabulary * shape.width
    prompts = jnp.zeros((B, shape.prompt), jnp.int32)
    run = jax.jit(generate, static_argnames="config")

    def rollout(tokens: int) -> float:
        config = SamplingConfig(max_new_tokens=tokens, eos_ids=())
        call = partial(run, config=config)
        return seconds(call, model, prompts, jnp.ones(prompts.shape, bool), jax.random.key(0))

    D, F = shape.width, 4 * shape.width
    pairs = WIDE // (2 * D * F)
    wide = jax.random.normal(jax.random.key(4), (pairs, D, F)) * D**-0.5
    narrow = jax.random.normal(jax.random.key(5), (pairs, F, D)) * F**-0.5
    rows = jax.random.normal(jax.random.key(6), (B, D))

    def chain(multiply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(x: jax.Array, *kernels: jax.Array) -> jax.Array:
            for kernel in kernels:
                x = multiply(x, kernel)
            return x

        return jax.jit(run)

    inputs_first = [kernel for pair in zip(wide, narrow, strict=True) for kernel in pair]
    outputs_first = [jnp.asarray(kernel.T) for kernel in inputs_first]
    forms = (chain(jnp.matmul), inputs_first), (chain(matmul_transposed), outputs_first)
    source = jax.random.normal(jax.random.key(7), (COPIED,))
    copy = jax.jit(jnp.copy)
    calls = {f"form {i}": partial(seconds, run, rows, *kernels) for i, (run, kernels) in enumerate(forms)}
    calls |= {"copy": lambda: seconds(copy, source), "one": lambda: rollout(1), "all": lambda: rollout(shape.response)}
    found = in_turns(calls, turns)
    step = (found["all"] - found["one"]) / (shape.response - 1)
    skinny = 2 * B * 2 * pairs * D * F / min(found["form 0"], found["form 1"])
    by_bytes, by_flops = 4 * weights / (2 * source.nbytes / found["copy"]), 2 * B * weights / skinny
    limit = 2 * B * weights / max(by_bytes, by_flops)
    return _row(shape, "decoding", step, 2 * B * weights / step, limit, max(by_bytes, by_flops) / step)


def _row(shape: Shape, what: str, step: float, rate: float, limit: float, fraction: float) -> dict[str, Any]:
    return {
        "shape": shape.name,
        "what": what,
        "ms": step * 1e3,
        "GFLOP/s": rate / 1e9,
        "limit GFLOP/s": limit / 1e9,
        "fraction": fraction,
    }


def main() -> None:
    """The table."""
    args = command_line(__doc__, quick="the first tiny shape alone, 3 turns").parse_args()
    shapes = SHAPES["tiny"][:1] if args.quick else [shape for shapes in SHAPES.values() for shape in shapes]
    turns = 3 if args.quick else 5
    rows = []
    for shape in shapes:
        rows += [update(shape, None, turns), update(shape, LORA, turns), decoding(shape, turns)]
    append("train_step", rows)
    tell(rows, as_json=args.json)


if __name__ == "__main__":
    main()

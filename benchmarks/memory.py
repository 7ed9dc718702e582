"""What fusing policy, value and reference saves: bytes and FLOPs of PPO for an H100, from XLA's cost analysis.

    python -m benchmarks.memory [--quick] [--json]

Both forms are compiled for an H100 that need not be there (`uv sync --group h100`), in bfloat16 with LoRA of rank 16 on
all linear layers, 8 responses of 512 tokens after prompts of 512, the shapes of Llama 3.2 1B and Llama 3 8B:

    fused    a critic's head on the policy's trunk; log-probabilities without logits in memory; one loss
    unfused  a critic of the policy's size with a trunk of its own; logits materialised in float32

and of two programs:

    step   a step of the optimiser: policy, value, losses and gradients
    learn  all that an iteration does with finished responses, with one epoch: the reference's log-probabilities,
           log-probabilities and values before the step, advantages, the step. Fused, log-probabilities and values are
           the rollout's; unfused, policy and critic have a pass of their own for them, as in TRL.

Everything else is the same: attention and norms by the same kernels, the same activations kept. XLA counts the body of
a loop once, so that models of one and two layers are compiled, whose layers stand outside of loops; each further layer
costs their difference. A kernel counts with its operands and results. "temporaries" are the compiler's, of two layers.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax._src.lib import xla_client

from benchmarks.results import append, command_line, tell
from pallas_kernels import hopper, linear_logprob
from rapidfire_jax import (
    PPOBatch,
    PPOConfig,
    PPOHParams,
    Rollouts,
    init_state,
    make_optimizer,
    make_policy,
    ppo_learn,
    ppo_step,
)
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.heads import CausalLM, RewardModel
from rapidfire_jax.models.policy import Inputs, Parts, Policy, TokenOutputs
from rapidfire_jax.models.remat import PRODUCTS, Group, Remat
from rapidfire_jax.planning.architectures import architecture

MODELS = {"1B": "meta-llama/Llama-3.2-1B", "8B": "meta-llama/Meta-Llama-3-8B"}
ROWS, PROMPT, RESPONSE = 8, 512, 512
LORA = {"rank": 16, "alpha": 32.0, "targets": "all-linear"}
PROGRAMS = ("step", "learn")
FORMS = ("fused", "unfused")
MEASURES = ("GB accessed", "TFLOP", "GB temporaries")


def unfused(policy: Policy, frozen: Parts, trainable: Parts, inputs: Inputs, length: int, temperature: Any) -> Any:
    """What `Policy.apply` says, from two trunks and from logits in memory."""
    model, critic = policy.merge(frozen, trainable), policy.merge_critic(frozen, trainable)
    assert critic is not None
    values = critic.value(_around_response(policy, critic, inputs, length))
    found = _log_probs(policy, model, inputs, length, temperature)
    return TokenOutputs(found.logp, found.entropy, values[:, :-1], values[:, -1])


def unfused_reference(policy: Policy, frozen: Parts, inputs: Inputs, length: int, temperature: Any) -> jax.Array:
    """What `Policy.reference` says, from logits in memory."""
    model = nnx.merge(policy.reference_graphdefs.policy, frozen.policy)
    return _log_probs(policy, model, inputs, length, temperature).logp


def _log_probs(policy: Policy, model: CausalLM, inputs: Inputs, length: int, temperature: Any) -> Any:
    hidden = _around_response(policy, model, inputs, length)[:, :-1]
    tokens = inputs.tokens[:, -length:]
    return linear_logprob(hidden, model.head, tokens, temperature=temperature, implementation="reference")


def _around_response(policy: Policy, model: Any, inputs: Inputs, length: int) -> jax.Array:
    return model.hidden(inputs.tokens, inputs.attention_mask, remat=policy.remat.policy)[:, -length - 1 :]


def compiled(config: DecoderConfig, program: str, form: str) -> jax.stages.Compiled:
    """A program for an H100, every layer of it outside of loops."""
    (kept,) = PRODUCTS.groups
    remat = Remat((Group(1, kept.keep),) * config.num_layers)
    optimizer, halves = make_optimizer("adamw"), list[Policy]()

    def start(key: jax.Array) -> Any:
        model, critic = (kind(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(key)) for kind in (CausalLM, RewardModel))
        policy, frozen, trainable = make_policy(
            model, key, lora=LORA, critic=None if form == "fused" else critic, remat=remat
        )
        halves.append(policy)
        return init_state(frozen, trainable, optimizer)

    state = jax.eval_shape(start, jax.random.key(0))
    (policy,) = halves
    apply, reference = policy.apply, policy.reference
    if form == "unfused":
        apply, reference = partial(unfused, policy), partial(unfused_reference, policy)
    tokens = jax.ShapeDtypeStruct((ROWS, PROMPT + RESPONSE), jnp.int32)
    numbers = jax.ShapeDtypeStruct((ROWS, RESPONSE), jnp.float32)
    hparams = PPOHParams(learning_rate=1e-5)
    learner = {"apply": apply, "optimizer": optimizer}

    def step(state: Any, tokens: jax.Array, numbers: list[jax.Array]) -> Any:
        mask = jnp.ones(tokens.shape, bool)
        batch = PPOBatch(Inputs(tokens, mask, Parts(None)), mask[:, -RESPONSE:], *numbers)
        return ppo_step(state, batch, hparams, **learner, config=PPOConfig())

    def learn(state: Any, tokens: jax.Array, numbers: list[jax.Array]) -> Any:
        mask = jnp.ones(tokens.shape, bool)
        rollouts = Rollouts(tokens, mask, mask[:, -RESPONSE:], mask[:, 0], *numbers[:2], score=numbers[2][:, 0])
        config = PPOConfig(epochs=1, recompute=form == "unfused")
        functions = {"reference": reference, "encode": policy.encode}
        return ppo_learn(state, rollouts, hparams, jax.random.key(0), **learner, **functions, config=config)

    run = {"step": step, "learn": learn}[program]
    return hopper.compile_for_h100(jax.jit(run, donate_argnums=0), state, tokens, [numbers] * 4)


def measure(config: DecoderConfig, program: str, form: str) -> dict[str, float]:
    """What the compiler says of a program."""
    executable = compiled(config, program, form)
    (module,) = executable.runtime_executable().hlo_modules()
    # A program for a device that is not there has no cost analysis of its own; XLA's counts in any HLO.
    costs = xla_client._xla.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    temporaries = executable.memory_analysis().temp_size_in_bytes
    return dict(zip(MEASURES, (costs["bytes accessed"] / 1e9, costs["flops"] / 1e12, temporaries / 1e9), strict=True))


def rows_of(name: str, program: str) -> list[dict[str, Any]]:
    """Both forms of a program of a model, and the ratio of the first to the second."""
    whole = architecture(MODELS[name])
    found = {}
    for form in FORMS:
        one, two = (measure(dataclasses.replace(whole, num_layers=layers), program, form) for layers in (1, 2))
        found[form] = {
            what: two[what]
            if what == "GB temporaries"
            else one[what] + (whole.num_layers - 1) * (two[what] - one[what])
            for what in MEASURES
        }
    found["fused / unfused"] = {what: found["fused"][what] / found["unfused"][what] for what in MEASURES}
    setting = {"model": name, "layers": whole.num_layers, "program": program}
    return [setting | {"form": form} | numbers for form, numbers in found.items()]


def main() -> None:
    """The table."""
    args = command_line(__doc__, quick="the 1B shape alone").parse_args()
    names = ("1B",) if args.quick else MODELS
    rows = [row for name in names for program in PROGRAMS for row in rows_of(name, program)]
    append("memory", rows)
    tell(rows, as_json=args.json)


if __name__ == "__main__":
    main()

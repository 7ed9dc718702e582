"""What fusing policy and value passes saves: bytes and FLOPs of a step of PPO for an H100, from XLA's cost analysis.

    python -m benchmarks.memory [--quick] [--json]

Both forms are compiled for an H100 that need not be there (`uv sync --group h100`), in bfloat16 with LoRA of rank 16 on
all linear layers, 8 responses of 512 tokens after prompts of 512, the shapes of Llama 3.2 1B and Llama 3 8B:

    fused    a critic's head on the policy's trunk; log-probabilities without logits in memory; one loss
    unfused  a critic of the policy's size with a trunk of its own; logits materialised in float32

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
from rapidfire_jax import PPOBatch, PPOConfig, PPOHParams, init_state, make_optimizer, make_policy, ppo_step
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.heads import CausalLM, RewardModel
from rapidfire_jax.models.policy import Inputs, Parts, Policy, TokenOutputs
from rapidfire_jax.models.remat import PRODUCTS, Group, Remat
from rapidfire_jax.planning.architectures import architecture

MODELS = {"1B": "meta-llama/Llama-3.2-1B", "8B": "meta-llama/Meta-Llama-3-8B"}
ROWS, PROMPT, RESPONSE = 8, 512, 512
LORA = {"rank": 16, "alpha": 32.0, "targets": "all-linear"}
FORMS = ("fused", "unfused")
MEASURES = ("GB accessed", "TFLOP", "GB temporaries")


def unfused(policy: Policy, frozen: Parts, trainable: Parts, inputs: Inputs, length: int, temperature: Any) -> Any:
    """What `Policy.apply` says, from two trunks and from logits in memory."""
    model, critic = policy.merge(frozen, trainable), policy.merge_critic(frozen, trainable)
    assert critic is not None
    tokens, mask, _ = inputs
    hidden, of_critic = (
        part.hidden(tokens, mask, remat=policy.remat.policy)[:, -length - 1 :] for part in (model, critic)
    )
    found = linear_logprob(
        hidden[:, :-1], model.head, tokens[:, -length:], temperature=temperature, implementation="reference"
    )
    values = critic.value(of_critic)
    return TokenOutputs(found.logp, found.entropy, values[:, :-1], values[:, -1])


def compiled_step(config: DecoderConfig, form: str) -> jax.stages.Compiled:
    """One step of PPO for an H100, every layer of it outside of loops."""
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
    apply = policy.apply if form == "fused" else partial(unfused, policy)
    tokens = jax.ShapeDtypeStruct((ROWS, PROMPT + RESPONSE), jnp.int32)
    numbers = jax.ShapeDtypeStruct((ROWS, RESPONSE), jnp.float32)

    def step(state: Any, tokens: jax.Array, numbers: list[jax.Array]) -> Any:
        mask = jnp.ones(tokens.shape, bool)
        batch = PPOBatch(Inputs(tokens, mask, Parts(None)), mask[:, -RESPONSE:], *numbers)
        hparams = PPOHParams(learning_rate=1e-5)
        return ppo_step(state, batch, hparams, apply=apply, optimizer=optimizer, config=PPOConfig())

    return hopper.compile_for_h100(jax.jit(step, donate_argnums=0), state, tokens, [numbers] * 4)


def measure(config: DecoderConfig, form: str) -> dict[str, float]:
    """What the compiler says of a step."""
    program = compiled_step(config, form)
    (module,) = program.runtime_executable().hlo_modules()
    # A program for a device that is not there has no cost analysis of its own; XLA's counts in any HLO.
    costs = xla_client._xla.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    return dict(
        zip(
            MEASURES,
            (costs["bytes accessed"] / 1e9, costs["flops"] / 1e12, program.memory_analysis().temp_size_in_bytes / 1e9),
            strict=True,
        )
    )


def rows_of(name: str) -> list[dict[str, Any]]:
    """Both forms of a model, and the ratio of the first to the second."""
    whole = architecture(MODELS[name])
    found = {}
    for form in FORMS:
        one, two = (measure(dataclasses.replace(whole, num_layers=layers), form) for layers in (1, 2))
        found[form] = {
            what: two[what]
            if what == "GB temporaries"
            else one[what] + (whole.num_layers - 1) * (two[what] - one[what])
            for what in MEASURES
        }
    found["fused / unfused"] = {what: found["fused"][what] / found["unfused"][what] for what in MEASURES}
    return [{"model": name, "layers": whole.num_layers, "form": form} | numbers for form, numbers in found.items()]


def main() -> None:
    """The table."""
    args = command_line(__doc__, quick="the 1B shape alone").parse_args()
    rows = [row for name in (("1B",) if args.quick else MODELS) for row in rows_of(name)]
    append("memory", rows)
    tell(rows, as_json=args.json)


if __name__ == "__main__":
    main()

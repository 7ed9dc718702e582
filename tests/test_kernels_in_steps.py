"""Which kernels stand in the programs of PPO for an H100, and how often; the body of a loop counts once."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_kernels import hopper
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
    ppo_targets,
    separate_optimizers,
)
from rapidfire_jax.algorithms.online import Rollouts
from rapidfire_jax.algorithms.train_state import gradient_step
from rapidfire_jax.models.heads import CausalLM
from rapidfire_jax.models.remat import FULL, keep_names
from tests.helpers.tiny import TINY

B, P, T = 2, 24, 40
LORA = {"rank": 4, "alpha": 8.0, "targets": "all-linear"}
CONFIG = dataclasses.replace(
    TINY,
    hidden_size=256,
    intermediate_size=384,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=512,
    num_layers=4,
)
TOKENS, MASK = jnp.zeros((B, P + T), jnp.int32), jnp.ones((B, P + T), bool)
NUMBERS = jnp.zeros((B, T), jnp.float32)


def kernels_of_a_step(lora=LORA, remat=None, optimizer="adamw", **changes):
    """Counts in `ppo_step`, and how many arrays are trained."""
    model = CausalLM(dataclasses.replace(CONFIG, **changes), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    policy, frozen, trainable = make_policy(model, jax.random.key(0), lora=lora, remat=remat)
    chain = make_optimizer(optimizer)
    state = init_state(frozen, trainable, chain)
    batch = PPOBatch(policy.encode(frozen, TOKENS, MASK), MASK[:, -T:], *[NUMBERS] * 4)
    step = partial(ppo_step, apply=policy.apply, optimizer=chain, config=PPOConfig())
    lowered = hopper.lower(step, state, batch, PPOHParams(learning_rate=1e-3))
    return dict(hopper.kernel_counts(lowered)), len(jax.tree.leaves(trainable))


# The body of the loop over layers and the last layer, with two norms each, and the norm before the heads.
STEP = {
    "flash_attention_forward": 2,
    "rms_norm_forward": 5,
    "rms_norm_backward": 5,
    "linear_logprob_forward": 1,
    "linear_logprob_backward": 1,
    "ppo_loss_forward": 1,
}


def test_step():
    counts, _ = kernels_of_a_step()
    backward = {k: counts.pop(k) for k in list(counts) if k.startswith("flash_attention_backward")}
    assert counts == STEP
    assert backward and set(backward.values()) == {2}


def test_remat_runs_the_forward_kernels_of_a_layer_once_more():
    plain, _ = kernels_of_a_step()
    again, _ = kernels_of_a_step(remat=FULL)
    assert again == plain | {"flash_attention_forward": 4, "rms_norm_forward": 5 + 4}


def test_what_a_kernel_leaves_for_its_backward_pass_can_be_kept():
    plain, _ = kernels_of_a_step()
    kept, _ = kernels_of_a_step(remat=keep_names("attention_out", "attention_lse"))
    assert kept == plain | {"rms_norm_forward": 5 + 4}
    kept, _ = kernels_of_a_step(remat=keep_names("residual", "rstd", "attention_norm", "mlp_norm"))
    assert kept == plain | {"flash_attention_forward": 4}


def test_layers_of_two_kinds_share_one_body():
    counts, _ = kernels_of_a_step(local_layers=frozenset({0, 2}), sliding_window=16)
    assert counts["flash_attention_forward"] == 2  # of the loop, and of the last layer


def test_adapters_on_the_last_layer_leave_the_others_without_a_backward_pass():
    counts, _ = kernels_of_a_step(LORA | {"layers": 1})
    assert counts["rms_norm_backward"] == 2 and counts["flash_attention_forward"] == 1


def test_the_8_bit_optimiser_is_one_kernel_an_array():
    counts, arrays = kernels_of_a_step(optimizer="adamw_8bit")
    assert counts["adamw_8bit_step"] == arrays - 2 > 10  # weights and bias of the value head are left to XLA


@pytest.mark.skipif(bool(hopper.toolchain()), reason="; ".join(hopper.toolchain()))
@pytest.mark.parametrize("kind", ["together", "separate"])
def test_the_8_bit_optimiser_writes_parameters_and_moments_in_place(kind):
    """As XLA compiles steps in a loop: all that is donated is written over, and nothing of its size is copied."""
    optimizer = make_optimizer("adamw_8bit", max_grad_norm=1.0)
    if kind == "separate":
        optimizer = separate_optimizers(optimizer, optimizer, lambda tree: {"a": False, "b": True})
    params = {name: jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16) for name in ("a", "b")}
    state = jax.eval_shape(lambda params: init_state(None, params, optimizer), params)
    rates = {"learning_rate": jnp.float32(1e-3), "critic_learning_rate": jnp.float32(1e-3)}

    def loss(params, x):
        y = (jnp.tanh(x @ params["a"]) @ params["b"]).astype(jnp.float32)
        return (y**2).sum(), jnp.float32(len(x)), {}

    def steps(state, batches):
        return jax.lax.scan(
            lambda state, x: gradient_step(state, x, loss, optimizer=optimizer, rates=rates), state, batches
        )

    batches = jax.ShapeDtypeStruct((4, 256, 1024), jnp.bfloat16)
    compiled = hopper.compile_for_h100(jax.jit(steps, donate_argnums=0), state, batches)
    text, size = compiled.as_text(), 1024 * 1024
    assert text.count("adamw_8bit_step") >= 2
    trained = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.trainable, state.opt_state)))
    assert compiled.memory_analysis().alias_size_in_bytes >= trained
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)
    assert not [shape for shape in copies if math.prod(map(int, shape.split(","))) >= size]
    assert not re.search(r"= bf16\[1024,1024\]\S* subtract\(", text)  # no difference of old and new


def test_rollout():
    model = CausalLM(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    sampling = SamplingConfig(max_new_tokens=T, eos_ids=(2,), top_k=8, top_p=0.9)
    run = partial(generate, config=sampling)
    counts = hopper.kernel_counts(hopper.lower(run, model, TOKENS[:, :P], MASK[:, :P], jax.random.key(0)))
    layers = CONFIG.num_layers
    assert counts["flash_attention_forward"] == 2  # prefill scans over all layers but the last
    assert counts["decode_attention_forward"] == layers  # the decode loop has them one by one
    assert counts["sampling_forward"] == 2  # the first token, and the loop
    assert counts["rms_norm_forward"] == 5 + 2 * layers + 1


def test_targets():
    rollouts = Rollouts(
        TOKENS, MASK, MASK[:, -T:], MASK[:, 0], NUMBERS, NUMBERS, ref_logp_t=NUMBERS, score=NUMBERS[:, 0]
    )
    run = partial(ppo_targets, config=PPOConfig())
    assert hopper.kernel_counts(hopper.lower(run, rollouts, None, PPOHParams())) == {"gae_forward": 1}

"""The programs of a run that learns from its own rollouts, from its configuration alone: no weights, no data."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rapidfire_jax.algorithms import online, tasks
from rapidfire_jax.algorithms.online import OnlineAlgorithm, Rollouts
from rapidfire_jax.algorithms.train_state import TrainState
from rapidfire_jax.config import OnlineRunConfig, RolloutConfig
from rapidfire_jax.data.prompts import prompt_buckets
from rapidfire_jax.models.policy import Policy
from rapidfire_jax.models.quantization import cast, round_inputs
from rapidfire_jax.programs import Program
from rapidfire_jax.rollout.generate import SamplingConfig, generate
from rapidfire_jax.training.job import learning_rate
from rapidfire_jax.training.models import numbers_of, static_of

# With dense weights on a GPU, where a step of few rows takes as long as reading them: products of the library that
# reads a layer's matrix in the stack, where Triton's and merged ones get a copy of it, in every step.
DECODING = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run. The jit boundary of the project."""

    rollout: Program  # (frozen, trainable, ids, mask, key, temperature) -> Rollouts, a group of rows to each prompt
    sample: Program  # the same, with one row to each prompt
    reference: Program  # (frozen, rollouts, temperature) -> ref_logp_t
    learn: Program  # (state, rollouts, hparams, key) -> (state, metrics); donates state


def compile_programs(
    algorithm: OnlineAlgorithm,
    policy: Policy,
    sampling: SamplingConfig,
    optimizer: optax.GradientTransformation,
    config: Any,
    decoding: RolloutConfig,
    options: dict[str, Any] | None = None,
) -> Programs:
    """Binds the static half of a run to the pure functions and jits them; `options` are of the rollout's compiler."""

    def rollout(sampling, frozen, trainable, ids, mask, key, temperature):
        if decoding.dtype is not None:
            frozen = cast(frozen, decoding.dtype)
            trainable = cast(trainable, decoding.dtype) if policy.full else trainable
        model = policy.merge(round_inputs(frozen) if decoding.activations else frozen, trainable)
        if decoding.dtype is not None:
            model.precision = dataclasses.replace(model.precision, compute=decoding.dtype)
        out = generate(model, ids, mask, key, temperature + config.temperature_shift, config=sampling)
        v_t = out.v_t if algorithm.has_critic else None
        return Rollouts(out.tokens, out.attention_mask, out.mask_t, out.ended, out.logp_t, v_t)

    def reference(frozen, rollouts, temperature):
        length = rollouts.mask_t.shape[1]
        inputs = policy.encode(frozen, rollouts.tokens, rollouts.attention_mask)
        return policy.reference(frozen, inputs, length, temperature + config.temperature_shift)

    def learn(state, rollouts, hparams, key):
        return online.learn(
            algorithm,
            state,
            rollouts,
            hparams,
            key,
            apply=policy.apply,
            reference=policy.reference,
            encode=policy.encode,
            optimizer=optimizer,
            config=config,
        )

    groups = one_each = Program("rollout", functools.partial(rollout, sampling), options=options)
    if sampling.samples_per_prompt > 1:
        single = dataclasses.replace(sampling, samples_per_prompt=1)
        one_each = Program("sample", functools.partial(rollout, single), options=options)
    return Programs(groups, one_each, Program("reference", reference), Program("learn", learn, donate=(0,)))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What makes programs and their arguments of a configuration, without weights or data."""

    config: OnlineRunConfig
    sampling: SamplingConfig
    static: Any  # of the algorithm
    optimizer: optax.GradientTransformation

    @property
    def reference_first(self) -> bool:
        """Whether the device does the reference while the host scores; not where it shares work with learning."""
        on_host = any(entry.kind != "model" for entry in self.config.reward)
        shares = self.config.adapter.layers is not None or self.static.packing
        return on_host and not shares and not getattr(self.static, "dynamic_sampling", False)

    def programs(self, policy: Policy) -> Programs:
        """The programs of a policy."""
        algorithm = tasks()[self.config.task]
        config = self.config
        options = DECODING if config.model.quantize is None else None
        return compile_programs(algorithm, policy, self.sampling, self.optimizer, self.static, config.rollout, options)

    def hparams(self, iteration: int) -> Any:
        """The numbers of an iteration, as float32 arrays so that none of them is a constant of the program."""
        config = self.config
        own = config.critic.optimizer
        return numbers_of(
            config,
            learning_rate=learning_rate(config.optimizer, iteration, config.training.iterations),
            critic_learning_rate=None if own is None else learning_rate(own, iteration, config.training.iterations),
            temperature=config.rollout.temperature,
        )

    def largest(self, rollout: Program, state: TrainState) -> dict[str, tuple[Any, ...]]:
        """Arguments of the programs by name, in part as shapes alone, with the longest prompts."""
        rows, length = self.config.rollout.batch_size, prompt_buckets(self.config.data.max_prompt_length)[-1]
        shape = rows // self.sampling.samples_per_prompt, length
        prompts, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))
        hparams, key = self.hparams(0), jax.random.key(0)
        args = state.frozen, state.trainable, prompts, mask, key, hparams.temperature
        rollouts = jax.eval_shape(rollout.function, *args)
        scored = dataclasses.replace(rollouts, score=jax.ShapeDtypeStruct((rows,), jnp.float32))
        if self.reference_first:
            scored = dataclasses.replace(scored, ref_logp_t=rollouts.old_logp_t)
        return {
            "rollout": args,
            "reference": (state.frozen, rollouts, hparams.temperature),
            "learn": (state, scored, hparams, key),
        }


def recipe_of(
    config: OnlineRunConfig, eos_ids: tuple[int, ...], eos_id: int | None, optimizer: optax.GradientTransformation
) -> Recipe:
    """The recipe of a configuration; `eos_ids` end a response, `eos_id` is the tokenizer's."""
    rollout = config.rollout
    static = static_of(config, recompute=rollout.log_probs == "recompute", eos_id=eos_id)
    sampling = SamplingConfig(
        max_new_tokens=rollout.max_new_tokens,
        eos_ids=eos_ids,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        int8_cache=rollout.cache == "int8",
        decode_batch_size=rollout.decode_batch_size,
        samples_per_prompt=getattr(static, "group_size", 1),
    )
    return Recipe(config, sampling, static, optimizer)

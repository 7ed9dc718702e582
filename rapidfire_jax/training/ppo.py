"""The PPO job: what `rapidfire train` runs for `task: ppo`.

Three programs are compiled, once for each bucket of prompt lengths: rollout, reference, and learning. Rewards run on
the host between the first and the last.
"""

import dataclasses
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rapidfire_jax.algorithms.optimizer import make_optimizer
from rapidfire_jax.algorithms.ppo import PPOConfig, PPOHParams, Rollouts, TrainState, init_state, ppo_learn
from rapidfire_jax.config import OptimizerConfig, RunConfig
from rapidfire_jax.data.prompts import PromptSet, batch_indices, load_prompts, pad_batch, prompt_buckets
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.auto import FlaxAutoModelForSequenceClassification, load_language_model
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import CausalLM, RewardModel
from rapidfire_jax.models.peft import save_adapter
from rapidfire_jax.models.policy import Policy, make_policy
from rapidfire_jax.models.tokenizer import check_vocabulary, load_tokenizer, stop_ids
from rapidfire_jax.rewards.base import Reward, load_reward
from rapidfire_jax.rollout.generate import SamplingConfig, generate
from rapidfire_jax.training.checkpoint import Checkpoints
from rapidfire_jax.training.evaluate import evaluate_policy, response_tokens
from rapidfire_jax.training.interrupt import Interrupted, InterruptGuard
from rapidfire_jax.training.plots import plot_run
from rapidfire_jax.training.reporting import Reporter, print_comparison
from rapidfire_jax.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a run. The jit boundary of the project."""

    rollout: Any  # (frozen, trainable, ids, mask, key, temperature) -> Rollouts
    reference: Any  # (frozen, rollouts, temperature) -> ref_logp_t
    learn: Any  # (state, rollouts, hparams, key) -> (state, metrics); donates state


def compile_programs(
    policy: Policy,
    sampling: SamplingConfig,
    optimizer: optax.GradientTransformation,
    config: PPOConfig,
    dtype: str | None,
) -> Programs:
    """Binds the static half of a run to the pure functions and jits them."""

    def cast(tree):
        return tree if dtype is None else jax.tree.map(lambda x: x.astype(dtype), tree)

    def rollout(frozen, trainable, ids, mask, key, temperature):
        model = policy.merge(cast(frozen), trainable if not policy.full else cast(trainable))
        if dtype is not None:
            model.precision = dataclasses.replace(model.precision, compute=dtype)
        out = generate(model, ids, mask, key, temperature, config=sampling)
        return Rollouts(out.tokens, out.attention_mask, out.mask_t, out.ended, out.logp_t, out.v_t)

    def reference(frozen, rollouts, temperature):
        length = rollouts.mask_t.shape[1]
        inputs = policy.encode(frozen, rollouts.tokens, rollouts.attention_mask)
        return policy.reference(frozen, inputs, length, temperature)

    def learn(state, rollouts, hparams, key):
        return ppo_learn(
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

    return Programs(jax.jit(rollout), jax.jit(reference), jax.jit(learn, donate_argnames="state"))


def learning_rate(config: OptimizerConfig, iteration: int, total: int) -> float:
    """Rate of an iteration (counted from 0): linear warm-up, then constant, linear or cosine decay to 0 at `total`."""
    if iteration < config.warmup:
        return config.learning_rate * (iteration + 1) / (config.warmup + 1)
    done = (iteration - config.warmup) / max(total - config.warmup, 1)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + np.cos(np.pi * done))}
    return config.learning_rate * float(shape[config.schedule])


class PPOJob:
    """One run from its configuration to its final policy. Everything that can be checked is checked in `__init__`."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.reward: Reward = load_reward(config.reward)
        model, critic, self.tokenizer = load_models(config)
        self.prompts, self.held_out = load_prompts(
            config.data,
            self.tokenizer,
            seed=config.seed,
            held_out=config.training.eval_prompts,
            max_new_tokens=config.rollout.max_new_tokens,
            context=model.config.max_positions,
        )
        self._try_reward(self.held_out)

        key = jax.random.key(config.seed)
        model_key, self.train_key, self.eval_key = jax.random.split(key, 3)
        self.policy, optimizer, self.state = start(config, model, critic, model_key)
        self.buckets = prompt_buckets(config.data.max_prompt_length)
        sampling = SamplingConfig(
            max_new_tokens=config.rollout.max_new_tokens,
            eos_ids=stop_ids(config.model.name, self.tokenizer),
            top_k=config.rollout.top_k,
            top_p=config.rollout.top_p,
        )
        rl = config.rl
        static = PPOConfig(
            epochs=rl.epochs,
            minibatches=rl.minibatches,
            kl_estimator=rl.kl_estimator,
            whiten_advantages=rl.whiten_advantages,
            recompute=config.rollout.log_probs == "recompute",
        )
        self.programs = compile_programs(self.policy, sampling, optimizer, static, config.rollout.dtype)

    def _try_reward(self, prompts: PromptSet) -> None:
        """Calls the reward once on two prompts, so that a broken one is known before any time is spent."""
        columns = {name: values[:2] for name, values in prompts.columns.items()}
        self.reward(list(prompts.texts[:2]), list(prompts.texts[:2]), columns)

    def hparams(self, iteration: int) -> PPOHParams:
        """The numbers of an iteration, as float32 arrays so that none of them is a constant of the program."""
        rl, total = self.config.rl, self.config.training.iterations
        numbers = PPOHParams(
            learning_rate=learning_rate(self.config.optimizer, iteration, total),
            kl_coef=rl.kl_coef,
            gamma=rl.gamma,
            lam=rl.lam,
            clip_range=rl.clip_range,
            value_clip_range=rl.value_clip_range,
            value_coef=rl.value_coef,
            entropy_coef=rl.entropy_coef,
            temperature=self.config.rollout.temperature,
            reward_clip=float("inf") if rl.reward_clip is None else rl.reward_clip,
            missing_eos_penalty=rl.missing_eos_penalty,
        )
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), numbers)

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration (counted from 0): rollout, reward, learning. Replaces `state`; returns the metrics."""
        config, hparams = self.config, self.hparams(iteration)
        sample_key, learn_key = jax.random.split(jax.random.fold_in(self.train_key, iteration))
        rows = batch_indices(iteration, config.rollout.batch_size, len(self.prompts.texts), config.seed)
        ids, mask = pad_batch([self.prompts.tokens[i] for i in rows], self.buckets, pad_id=0)

        clock = [time.perf_counter()]
        state = self.state
        rollouts = self.programs.rollout(state.frozen, state.trainable, ids, mask, sample_key, hparams.temperature)
        responses = response_tokens(rollouts)
        clock.append(time.perf_counter())
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        columns = {name: [values[i] for i in rows] for name, values in self.prompts.columns.items()}
        scores = self.reward([self.prompts.texts[i] for i in rows], texts, columns)
        clock.append(time.perf_counter())
        rollouts = dataclasses.replace(rollouts, score=jnp.asarray(scores.total))
        self.state, metrics = self.programs.learn(state, rollouts, hparams, learn_key)
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        clock.append(time.perf_counter())

        if not np.isfinite(numbers["loss/total"]):
            raise FloatingPointError(f"the loss of iteration {iteration + 1} is {numbers['loss/total']}")
        if len(scores.components) > 1:
            numbers |= {f"reward/{name}": float(values.mean()) for name, values in scores.components.items()}
        phases = dict(zip(("rollout", "reward", "learn"), np.diff(clock).tolist(), strict=True))
        return (
            numbers
            | {f"seconds/{name}": seconds for name, seconds in phases.items()}
            | {
                "tokens_per_second": sum(map(len, responses)) / sum(phases.values()),
                "learning_rate": float(hparams.learning_rate),
                "peak_bytes": float(peak_bytes()),
            }
        )

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and samples on the held-out prompts, with the same random key every time."""
        state, temperature = self.state, self.hparams(0).temperature

        def sample(ids, mask, key):
            return self.programs.rollout(state.frozen, state.trainable, ids, mask, key, temperature)

        def reference(rollouts):
            return self.programs.reference(state.frozen, rollouts, temperature)

        return evaluate_policy(
            sample,
            reference,
            self.held_out,
            self.reward,
            self.tokenizer,
            self.eval_key,
            batch_size=self.config.rollout.batch_size,
            buckets=self.buckets,
        )


def load_models(config: RunConfig) -> tuple[CausalLM, RewardModel | None, "PreTrainedTokenizerFast"]:
    """The policy's model, the separate critic's if there is one, and the tokenizer that both fit."""
    model, critic = load_language_model(**config.model.model_dump()), None
    tokenizer = load_tokenizer(config.model.name)
    check_vocabulary(config.model.name, model.config.vocab_size, tokenizer)
    if config.critic is not None:
        critic = FlaxAutoModelForSequenceClassification.from_pretrained(**config.critic.model_dump())
        check_vocabulary(config.critic.name, critic.config.vocab_size, tokenizer)
    return model, critic, tokenizer


def start(
    config: RunConfig, model: CausalLM, critic: RewardModel | None, key: jax.Array
) -> tuple[Policy, optax.GradientTransformation, TrainState]:
    """The policy, its optimiser and the state before the first iteration."""
    adapter, optim = config.adapter, config.optimizer
    lora = adapter.model_dump(exclude={"type"}) if adapter.type == "lora" else None
    policy, frozen, trainable = make_policy(model, key, lora=lora, critic=critic, remat=config.memory.remat == "full")
    optimizer = make_optimizer(
        optim.name,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
    )
    return policy, optimizer, init_state(frozen, trainable, optimizer)


def export_policy(
    config: RunConfig, policy: Policy, state: TrainState, tokenizer: "PreTrainedTokenizerFast", folder: Path
) -> None:
    """Writes the policy as a Hugging Face folder (adapters merged), its adapter and a separate critic below it."""
    model = policy.merge(state.frozen, state.trainable)
    save_pretrained(model, folder, tokenizer, eos_ids=stop_ids(config.model.name, tokenizer))
    if config.adapter.type == "lora" and config.model.adapter is None:
        save_adapter(model, folder / "adapter", base_model_name=config.model.name, rslora=config.adapter.rslora)
    if (critic := policy.merge_critic(state.frozen, state.trainable)) is not None:
        save_pretrained(critic, folder / "critic", tokenizer)


def export_checkpoint(run: RunDirectory, folder: Path) -> int:
    """Writes the policy of a run's newest checkpoint, finished or not; the iteration it is of.

    Raises:
      InputError: no checkpoint yet, or `folder` holds something else.
    """
    config = run.load_config()
    checkpoints = Checkpoints(run.checkpoints, config.training.keep_checkpoints)
    if checkpoints.latest is None:
        raise InputError(f"{run.path}: the run has saved no checkpoint yet")
    model, critic, tokenizer = load_models(config)
    policy, _, state = start(config, model, critic, jax.random.key(0))
    export_policy(config, policy, checkpoints.restore(state)[0], tokenizer, folder)
    checkpoints.close()
    return checkpoints.latest


def peak_bytes() -> int:
    """Peak memory: of the device where it keeps statistics, otherwise resident memory of this process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(config: RunConfig, run: RunDirectory) -> dict[str, Any]:
    """Runs or continues a job to its end; returns the summary.

    Raises:
      InputError: before training where it can be known, otherwise after a checkpoint has been saved.
      Interrupted: a signal came; a checkpoint has been saved unless training had not begun.
    """
    with InterruptGuard() as guard:
        try:
            job = PPOJob(config)
        except InputError:
            if not run.metrics.exists():
                run.discard()
            raise
        except Interrupted as stop:
            message = f"stopped before training began; start it with: rapidfire train --resume {run.path}"
            raise Interrupted(stop.signum, message) from None
        checkpoints = Checkpoints(run.checkpoints, config.training.keep_checkpoints)
        done, seconds, evaluations = 0, 0.0, {}
        if checkpoints.latest is not None:
            job.state, record = checkpoints.restore(job.state)
            done, seconds, evaluations = checkpoints.latest, record["seconds"], record["evaluations"]
            print(f"continuing {run.path} after iteration {done}", flush=True)
        run.rewind(done, evaluations)
        guard.defer = True
        try:
            return _loop(job, run, checkpoints, guard, done, seconds, evaluations)
        finally:
            checkpoints.close()


def _loop(
    job: PPOJob,
    run: RunDirectory,
    checkpoints: Checkpoints,
    guard: InterruptGuard,
    done: int,
    seconds: float,
    evaluations: dict[str, Any],
) -> dict[str, Any]:
    config, training = job.config, job.config.training
    began_at = time.perf_counter() - seconds
    durations: list[float] = []

    def save() -> None:
        checkpoints.save(done, job.state, {"seconds": time.perf_counter() - began_at, "evaluations": evaluations})

    def stop_if_asked() -> None:
        if guard.signum is not None:
            save()
            raise Interrupted(
                guard.signum, f"stopped after iteration {done}; continue with: rapidfire train --resume {run.path}"
            )

    def evaluate(phase: str, reporter: Reporter) -> None:
        metrics, samples = job.evaluate()
        evaluations[phase] = metrics
        reporter.evaluation(done, phase, metrics)
        run.append(run.samples, [{"iteration": done, "phase": phase} | sample for sample in samples])

    try:
        with Reporter(
            run, done=done, total=training.iterations, tensorboard=job.config.logging.tensorboard
        ) as reporter:
            if "before" not in evaluations:
                evaluate("before", reporter)
            while done < training.iterations:
                stop_if_asked()
                began = time.perf_counter()
                metrics = job.iterate(done)
                done += 1
                durations.append(time.perf_counter() - began)
                reporter.iteration(done, metrics, float(np.median(durations)) * (training.iterations - done))
                if training.eval_every and done % training.eval_every == 0 and done < training.iterations:
                    evaluate(f"iteration {done}", reporter)
                if done % training.checkpoint_every == 0 or done == training.iterations:
                    save()
            stop_if_asked()
            evaluate("after", reporter)
    except Exception as error:
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(job.state)) and not isinstance(
            error, FloatingPointError
        ):
            save()
        raise

    export_policy(config, job.policy, job.state, job.tokenizer, run.final)
    records = run.read(run.metrics)
    plot_run(records, run.plots)
    summary = {
        "before": evaluations["before"],
        "after": evaluations["after"],
        "seconds": time.perf_counter() - began_at,
        "iterations": done,
        "tokens_per_second": float(np.median([r["tokens_per_second"] for r in records if "tokens_per_second" in r])),
        "peak_bytes": peak_bytes(),
    }
    run.write_json(run.summary.name, summary)
    print_comparison(evaluations["before"], evaluations["after"], training.eval_prompts)
    return summary

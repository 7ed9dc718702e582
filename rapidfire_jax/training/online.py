"""The job of a policy that learns from its own rollouts: PPO, GRPO, RLOO, REINFORCE++.

Three programs are compiled, once for each bucket of prompt lengths: rollout, reference, and learning. Rewards run on
the host between the first and the last; while functions and servers are at it, the device does the reference.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rapidfire_jax.algorithms import tasks
from rapidfire_jax.algorithms.advantages import informative_groups
from rapidfire_jax.algorithms.online import OnlineAlgorithm, Rollouts
from rapidfire_jax.config import OnlineRunConfig
from rapidfire_jax.data.packing import pack_rollouts
from rapidfire_jax.data.prompts import PromptSet, load_prompts, pad_batch, prompt_buckets
from rapidfire_jax.models.policy import Policy
from rapidfire_jax.models.tokenizer import stop_ids
from rapidfire_jax.programs import peak_bytes
from rapidfire_jax.rewards.base import Reward, Scores, load_reward
from rapidfire_jax.training.evaluate import evaluate_policy, response_tokens, win_rate
from rapidfire_jax.training.job import check_finite
from rapidfire_jax.training.models import load_trainee, run_keys
from rapidfire_jax.training.plots import ONLINE_PLOTS
from rapidfire_jax.training.recipe import recipe_of
from rapidfire_jax.training.remat import fit_plan


@dataclasses.dataclass
class _Batch:
    """Scored rollouts of one iteration, and what they cost."""

    rollouts: Rollouts
    scores: Scores
    tokens: int  # response tokens sampled, those of responses that were not kept included
    rounds: int
    seconds: dict[str, float]


class OnlineJob:
    """One run from its configuration to its final policy. Everything that can be checked is checked in `__init__`."""

    headline = (("reward", "reward", "{:.3f}"), ("kl", "KL", "{:5.2f}"), ("tokens_per_second", "tokens/s", "{:4.0f}"))
    plots = ONLINE_PLOTS

    def __init__(self, config: OnlineRunConfig):
        self.config = config
        self.iterations = config.training.iterations
        self.held_out_name = f"{config.training.eval_prompts} held-out prompts"
        self.algorithm: OnlineAlgorithm = tasks()[config.task]
        load_reward([entry for entry in (*config.reward, *config.judge) if entry.kind != "model"])  # the cheap ones
        trainee = load_trainee(config)
        self.trainee, self.tokenizer, self.state = trainee, trainee.tokenizer, trainee.state
        self.prompts, self.held_out = load_prompts(
            config.data,
            self.tokenizer,
            seed=config.seed,
            held_out=config.training.eval_prompts,
            max_new_tokens=config.rollout.max_new_tokens,
            context=trainee.context,
        )
        special = self.tokenizer.all_special_tokens
        self.reward: Reward = load_reward(config.reward, special_tokens=special)
        self.judge = load_reward(config.judge, special_tokens=special) if config.judge else None
        self._try_rewards(self.held_out)

        _, self.train_key, self.eval_key = run_keys(config.seed)
        self.recipe = recipe_of(
            config, stop_ids(config.model.name, self.tokenizer), self.tokenizer.eos_token_id, trainee.optimizer
        )
        self.static = self.recipe.static
        self.group_size = getattr(self.static, "group_size", 1)
        self.dynamic = getattr(self.static, "dynamic_sampling", False)
        buckets = prompt_buckets(config.data.max_prompt_length)
        self.buckets = buckets[-1:] if self.dynamic else buckets  # rollouts of several rounds are put together
        self.taken = 0  # batches of prompts
        assert isinstance(trainee.model, Policy)
        self.policy, self.fitted = trainee.model, None
        programs = functools.cache(self.recipe.programs)  # what was compiled to find a plan is what runs
        if config.memory.remat == "auto":
            args = self.recipe.largest(programs(self.policy).rollout, self.state)["learn"]
            self.policy, self.fitted = fit_plan(self.policy, lambda policy: programs(policy).learn, args, config.memory)
        self.programs = programs(self.policy)

    def _try_rewards(self, prompts: PromptSet) -> None:
        """Calls the rewards once on two prompts, so that a broken one is known before any time is spent."""
        two = prompts.select(range(min(2, len(prompts))))
        for reward in (self.reward, self.judge):
            if reward is not None:
                reward(list(two.texts), list(two.texts), two.columns, two.tokens)

    def progress(self) -> dict[str, Any]:
        """How many batches of prompts have been taken."""
        return {"taken": self.taken}

    def resume(self, progress: dict[str, Any]) -> None:
        """Goes on with the batch of prompts after those taken."""
        self.taken = progress["taken"]

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration (counted from 0): rollout, reward, learning. Replaces `state`; returns the metrics."""
        hparams = self.recipe.hparams(iteration)
        sample_key, learn_key = jax.random.split(jax.random.fold_in(self.train_key, iteration))
        batch = self._sample_until_informative(sample_key, hparams.temperature)
        began = time.perf_counter()
        rollouts = batch.rollouts
        if self.static.packing:
            parts = self.static.minibatches * self.static.micro_batches
            rollouts = dataclasses.replace(rollouts, packing=pack_rollouts(rollouts.attention_mask, parts))
        self.state, metrics = self.programs.learn(self.state, rollouts, hparams, learn_key)
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        batch.seconds["learn"] = time.perf_counter() - began
        self.taken += batch.rounds  # not before: an iteration that fails is done again from its first prompt

        numbers = check_finite(numbers, iteration)
        if len(batch.scores.components) > 1:
            numbers |= {f"reward/{name}": float(values.mean()) for name, values in batch.scores.components.items()}
        if self.dynamic:
            numbers["objective/sampling_rounds"] = float(batch.rounds)
        return (
            numbers
            | {f"seconds/{name}": seconds for name, seconds in batch.seconds.items()}
            | {
                "tokens_per_second": batch.tokens / sum(batch.seconds.values()),
                "learning_rate": float(hparams.learning_rate),
                "peak_bytes": float(peak_bytes()),
            }
        )

    def _sample_until_informative(self, key: jax.Array, temperature: jax.Array) -> _Batch:
        """The rollouts to learn from; with dynamic sampling, prompts whose responses differ in reward come first."""
        batch = self._sample(self.taken, key, temperature)
        if not self.dynamic:
            return batch
        rows = self.config.rollout.batch_size
        while True:
            scores: Any = batch.scores.overall  # NumPy, which compiles nothing for a new size
            informative = informative_groups(scores, self.group_size)
            if informative.sum() >= rows or batch.rounds == self.static.max_sampling_rounds:
                break
            more = self._sample(self.taken + batch.rounds, jax.random.fold_in(key, batch.rounds), temperature)
            batch = _joined(batch, more)
        return _selected(batch, np.argsort(~informative, kind="stable")[:rows])

    def _sample(self, number: int, key: jax.Array, temperature: jax.Array) -> _Batch:
        """Rollouts of one batch of prompts, and their scores."""
        prompts = self.prompts.batch(number, self.config.rollout.batch_size // self.group_size)
        ids, mask = pad_batch(prompts.tokens, self.buckets, pad_id=0)
        prompts = prompts.select([i for i in range(len(prompts)) for _ in range(self.group_size)])
        clock = [time.perf_counter()]
        rollouts = self.programs.rollout(self.state.frozen, self.state.trainable, ids, mask, key, temperature)
        if self.recipe.reference_first:
            ref_logp_t = self.programs.reference(self.state.frozen, rollouts, temperature)
            rollouts = dataclasses.replace(rollouts, ref_logp_t=ref_logp_t)
        responses = response_tokens(rollouts)
        clock.append(time.perf_counter())
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = self.reward(list(prompts.texts), texts, prompts.columns, responses)
        clock.append(time.perf_counter())
        rollouts = dataclasses.replace(rollouts, score=jnp.asarray(scores.total))
        if scores.token_rewards is not None:
            token_reward_t = np.zeros(rollouts.mask_t.shape, np.float32)
            for row, values in zip(token_reward_t, scores.token_rewards, strict=True):
                row[: len(values)] = values
            rollouts = dataclasses.replace(rollouts, token_reward_t=jnp.asarray(token_reward_t))
        seconds = dict(zip(("rollout", "reward"), np.diff(clock).tolist(), strict=True))
        return _Batch(rollouts, scores, sum(map(len, responses)), 1, seconds)

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and samples on the held-out prompts, with the same random key every time."""
        state, temperature = self.state, self.recipe.hparams(0).temperature

        def sample(ids, mask, key):
            return self.programs.sample(state.frozen, state.trainable, ids, mask, key, temperature)

        def reference(rollouts):
            return self.programs.reference(state.frozen, rollouts, temperature)

        return evaluate_policy(
            sample,
            reference,
            self.held_out,
            self.reward,
            self.judge,
            self.tokenizer,
            self.eval_key,
            batch_size=self.config.rollout.batch_size,
            buckets=self.buckets,
        )

    def compare(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """With a judge: the share of held-out prompts whose response after training is better than the one before."""
        if self.judge is None:
            return {}
        return {"win_rate": {name: win_rate(samples, name) for name in ("reward", "judge")}}

    def export(self, folder: Path) -> None:
        """Writes the policy."""
        self.trainee.export(self.state, folder)


def _joined(one: _Batch, two: _Batch) -> _Batch:
    def parts(*values):
        return None if values[0] is None else [row for part in values for row in part]

    scores = Scores(
        np.concatenate([one.scores.total, two.scores.total]),
        {name: np.concatenate([values, two.scores.components[name]]) for name, values in one.scores.components.items()},
        parts(one.scores.token_rewards, two.scores.token_rewards),
    )
    rollouts = jax.tree.map(lambda a, b: np.concatenate([a, b]), one.rollouts, two.rollouts)
    seconds = {name: value + two.seconds[name] for name, value in one.seconds.items()}
    return _Batch(rollouts, scores, one.tokens + two.tokens, one.rounds + two.rounds, seconds)


def _selected(batch: _Batch, rows: np.ndarray) -> _Batch:
    scores = Scores(
        batch.scores.total[rows],
        {name: values[rows] for name, values in batch.scores.components.items()},
        None if batch.scores.token_rewards is None else [batch.scores.token_rewards[i] for i in rows],
    )
    rollouts = jax.tree.map(lambda x: np.asarray(x)[rows], batch.rollouts)
    return dataclasses.replace(batch, rollouts=rollouts, scores=scores)

"""The job of a model that learns from given data: SFT, reward modelling, DPO.

Two programs are compiled, once for each pair of buckets of lengths: a step and an evaluation.
"""

import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rapidfire_jax.algorithms import offline, tasks
from rapidfire_jax.algorithms.masking import finish
from rapidfire_jax.algorithms.offline import OfflineAlgorithm
from rapidfire_jax.config import OfflineRunConfig
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.policy import Policy
from rapidfire_jax.models.scorer import Scorer
from rapidfire_jax.programs import Program, peak_bytes
from rapidfire_jax.training.batches import load_batches, real_tokens
from rapidfire_jax.training.job import check_finite, learning_rate
from rapidfire_jax.training.models import load_trainee, numbers_of, static_of
from rapidfire_jax.training.plots import OFFLINE_PLOTS
from rapidfire_jax.training.remat import fit_plan, shapes
from rapidfire_jax.training.reporting import Headline


class OfflineJob:
    """One run from its configuration to its final model. Everything that can be checked is checked in `__init__`."""

    plots = OFFLINE_PLOTS

    def __init__(self, config: OfflineRunConfig):
        self.config = config
        self.algorithm: OfflineAlgorithm = tasks()[config.task]
        self.trainee = load_trainee(config)
        self.state = self.trainee.state
        self.static = static_of(config)
        self.batches = load_batches(config, self.algorithm, self.trainee.tokenizer, self.trainee.context)
        self.held_out_name = f"{config.training.eval_examples} held-out examples"
        self.iterations = self._count_iterations()
        accuracy: Headline = () if config.task == "sft" else (("accuracy", "accuracy", "{:.2f}"),)
        self.headline: Headline = (
            ("loss/total", "loss", "{:.4f}"),
            *accuracy,
            ("tokens_per_second", "tokens/s", "{:5.0f}"),
        )
        optimizer = self.trainee.optimizer

        @functools.cache
        def step_of(model: Policy | Scorer) -> Program:
            step = functools.partial(offline.step, self.algorithm, model=model, optimizer=optimizer, config=self.static)
            return Program("step", step, donate=(0,))

        self.fitted, model = None, self.trainee.model
        if config.memory.remat == "auto":
            if self.batches.widest is None:
                raise InputError(
                    "memory.remat=auto: a stream does not say how long its examples are; name what to keep"
                )
            args = self.state, shapes(self.batches.widest()), self.hparams(0)
            model, self.fitted = fit_plan(model, step_of, args, config.memory)
        self._step = step_of(model)
        evaluate = functools.partial(offline.evaluate, self.algorithm, model=model, config=self.static)
        self._evaluate = Program("evaluate", evaluate)

    def _count_iterations(self) -> int:
        training = self.config.training
        if training.iterations is not None:
            return training.iterations
        if self.batches.rows is None:
            raise InputError("training.epochs cannot be counted with data.streaming; give training.iterations")
        assert training.epochs is not None
        return max(1, math.ceil(training.epochs * self.batches.rows / self.static.batch_size))

    def hparams(self, iteration: int) -> Any:
        """The numbers of an iteration, as float32 arrays so that none of them is a constant of the program."""
        return numbers_of(self.config, learning_rate=learning_rate(self.config.optimizer, iteration, self.iterations))

    def iterate(self, iteration: int) -> dict[str, float]:
        """One optimiser step, counted from 0. Replaces `state`; returns the metrics."""
        began = time.perf_counter()
        batch = self.batches.train(iteration)
        hparams = self.hparams(iteration)
        self.state, metrics = self._step(self.state, batch, hparams)
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        return check_finite(numbers, iteration) | {
            "tokens_per_second": real_tokens(batch) / (time.perf_counter() - began),
            "learning_rate": float(hparams.learning_rate),
            "peak_bytes": float(peak_bytes()),
        }

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics on the held-out examples; there are no samples."""
        hparams = self.hparams(0)
        parts = [self._evaluate(self.state, batch, hparams) for batch in self.batches.held_out]
        metrics = finish(jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(parts)))
        return {name: float(value) for name, value in metrics.items()}, []

    def compare(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def progress(self) -> dict[str, Any]:
        """Nothing: batches are a function of the iteration."""
        return {}

    def resume(self, progress: dict[str, Any]) -> None:
        """Nothing to take back."""

    def export(self, folder: Path) -> None:
        """Writes the model."""
        self.trainee.export(self.state, folder)

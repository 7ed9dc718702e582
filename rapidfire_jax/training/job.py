"""The host loop that every job runs in: progress, checkpoints, interruption, evaluation, summary."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from rapidfire_jax.algorithms.loss_scale import SMALLEST
from rapidfire_jax.algorithms.train_state import TrainState
from rapidfire_jax.config import OfflineRunConfig, OnlineRunConfig, OptimizerConfig, RunConfig
from rapidfire_jax.errors import InputError
from rapidfire_jax.programs import peak_bytes
from rapidfire_jax.training.checkpoint import Checkpoints
from rapidfire_jax.training.interrupt import Interrupted, InterruptGuard
from rapidfire_jax.training.plots import Plots, plot_run
from rapidfire_jax.training.remat import Fitted
from rapidfire_jax.training.reporting import Headline, Reporter, print_comparison
from rapidfire_jax.training.run_directory import RunDirectory


class Job(Protocol):
    """One run from its configuration to its final model. Everything that can be checked is checked when it is made."""

    state: TrainState
    iterations: int
    held_out_name: str  # of what it is evaluated on
    plots: Plots
    fitted: Fitted | None  # plan of what is kept for the backward pass, if it was chosen by a budget

    @property
    def config(self) -> RunConfig:
        """What the job was made from."""

    @property
    def headline(self) -> Headline:
        """Metrics of the progress line."""

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration, counted from 0. Replaces `state`; returns the metrics, `tokens_per_second` among them."""

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics on held-out data, the same ones every time, and a record a sample."""

    def export(self, folder: Path) -> None:
        """Writes the model as a Hugging Face folder."""

    def compare(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """What the summary says besides the metrics before and after, from the samples of both."""

    def progress(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides arrays, as JSON."""

    def resume(self, progress: dict[str, Any]) -> None:
        """Takes back what `progress` gave."""


def learning_rate(config: OptimizerConfig, iteration: int, total: int) -> float:
    """Rate of an iteration (counted from 0): linear warm-up, then constant, linear or cosine decay to 0 at `total`."""
    if iteration < config.warmup:
        return config.learning_rate * (iteration + 1) / (config.warmup + 1)
    done = (iteration - config.warmup) / max(total - config.warmup, 1)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + np.cos(np.pi * done))}
    return config.learning_rate * float(shape[config.schedule])


def make_job(config: RunConfig) -> Job:
    """The job of a configuration."""
    if isinstance(config, OnlineRunConfig):
        from rapidfire_jax.training.online import OnlineJob

        return OnlineJob(config)
    from rapidfire_jax.training.offline import OfflineJob

    assert isinstance(config, OfflineRunConfig)
    return OfflineJob(config)


def train(config: RunConfig, run: RunDirectory, make: Callable[[Any], Job] = make_job) -> dict[str, Any]:
    """Runs or continues a job to its end; returns the summary.

    Raises:
      InputError: before training where it can be known, otherwise after a checkpoint has been saved.
      Interrupted: a signal came; a checkpoint has been saved unless training had not begun.
    """
    with InterruptGuard() as guard:
        try:
            job = make(config)
        except InputError:
            if not run.metrics.exists():
                run.discard()
            raise
        except Interrupted as stop:
            message = f"stopped before training began; start it with: rapidfire train --resume {run.path}"
            raise Interrupted(stop.signum, message) from None
        if job.fitted is not None:
            job.fitted.show()
            run.write_json("remat.json", job.fitted.record())
        checkpoints = Checkpoints(run.checkpoints, config.training.keep_checkpoints)
        done, seconds, evaluations = 0, 0.0, {}
        if checkpoints.latest is not None:
            job.state, record = checkpoints.restore(job.state)
            done, seconds, evaluations = checkpoints.latest, record["seconds"], record["evaluations"]
            job.resume(record["progress"])
            print(f"continuing {run.path} after iteration {done}", flush=True)
        run.rewind(done, evaluations)
        guard.defer = True
        try:
            return _loop(job, run, checkpoints, guard, done, seconds, evaluations)
        finally:
            checkpoints.close()


def export_checkpoint(run: RunDirectory, folder: Path) -> int:
    """Writes the model of a run's newest checkpoint, finished or not; the iteration it is of.

    Raises:
      InputError: no checkpoint yet, or `folder` holds something else.
    """
    config = run.load_config()
    checkpoints = Checkpoints(run.checkpoints, config.training.keep_checkpoints)
    if checkpoints.latest is None:
        raise InputError(f"{run.path}: the run has saved no checkpoint yet")
    from rapidfire_jax.training.models import load_trainee

    trainee = load_trainee(config)
    trainee.export(checkpoints.restore(trainee.state)[0], folder)
    checkpoints.close()
    return checkpoints.latest


def _loop(
    job: Job,
    run: RunDirectory,
    checkpoints: Checkpoints,
    guard: InterruptGuard,
    done: int,
    seconds: float,
    evaluations: dict[str, Any],
) -> dict[str, Any]:
    training, total = job.config.training, job.iterations
    began_at = time.perf_counter() - seconds
    durations: list[float] = []

    def save() -> None:
        record = {
            "seconds": time.perf_counter() - began_at,
            "evaluations": evaluations,
            "progress": job.progress(),
        }
        checkpoints.save(done, job.state, record)

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
        with Reporter(run, job, done=done, tensorboard=job.config.logging.tensorboard) as reporter:
            if "before" not in evaluations:
                evaluate("before", reporter)
            while done < total:
                stop_if_asked()
                began = time.perf_counter()
                metrics = job.iterate(done)
                done += 1
                durations.append(time.perf_counter() - began)
                reporter.iteration(done, metrics, float(np.median(durations)) * (total - done))
                if training.eval_every and done % training.eval_every == 0 and done < total:
                    evaluate(f"iteration {done}", reporter)
                if done % training.checkpoint_every == 0 or done == total:
                    save()
            stop_if_asked()
            evaluate("after", reporter)
    except Exception as error:
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(job.state)) and not isinstance(
            error, FloatingPointError
        ):
            save()
        raise

    job.export(run.final)
    records = run.read(run.metrics)
    plot_run(records, run.plots, job.plots)
    summary = {
        "before": evaluations["before"],
        "after": evaluations["after"],
        "seconds": time.perf_counter() - began_at,
        "iterations": done,
        "tokens_per_second": float(np.median([r["tokens_per_second"] for r in records if "tokens_per_second" in r])),
        "peak_bytes": peak_bytes(),
    } | job.compare(run.read(run.samples))
    run.write_json(run.summary.name, summary)
    print_comparison(job.held_out_name, summary)
    return summary


def check_finite(numbers: dict[str, float], iteration: int) -> dict[str, float]:
    """The metrics of an iteration; with a loss scale, without those that overflowed in every step.

    Raises:
      FloatingPointError: naming the iteration, counted from 0: its loss is no number, or no step of it could be taken
        though the loss is not scaled up any more.
    """
    if "precision/loss_scale" not in numbers:
        if not np.isfinite(numbers["loss/total"]):
            raise FloatingPointError(f"the loss of iteration {iteration + 1} is {numbers['loss/total']}")
        return numbers
    if numbers["precision/loss_scale"] <= SMALLEST and not np.isfinite(numbers["policy/gradient_norm"]):
        raise FloatingPointError(
            f"every step of iteration {iteration + 1} overflows in float16, with a loss scale of {SMALLEST:g} too; "
            "use model.compute_dtype=float32 (or bfloat16, where the hardware has it)"
        )
    return {name: number for name, number in numbers.items() if np.isfinite(number)}

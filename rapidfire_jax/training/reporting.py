"""What a run tells while it runs: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rapidfire_jax.training.run_directory import RunDirectory


class Reporter:
    """Writes every iteration's metrics to all sinks. A context manager: the bar and the files are closed at the end."""

    def __init__(self, run: RunDirectory, *, done: int, total: int, tensorboard: bool):
        self._run, self._total = run, total
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(run.tensorboard), purge_step=done + 1 if done else None)
        self._bar = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("[bold]PPO"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "Reporter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._writer:
            self._writer.close()

    def iteration(self, iteration: int, metrics: dict[str, float], seconds_left: float) -> None:
        """Reports a finished iteration."""
        self._run.append(self._run.metrics, [{"iteration": iteration} | metrics])
        self._scalars(iteration, metrics)
        line = f"reward {metrics['reward']:.3f}  KL {metrics['kl']:5.2f}  {metrics['tokens_per_second']:4.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=iteration, description=line)
        else:
            left = f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d} left"
            self._say(f"iteration {iteration:3d}/{self._total}  {line}  {left}")

    def evaluation(self, iteration: int, phase: str, metrics: dict[str, float]) -> None:
        """Reports an evaluation on the held-out prompts."""
        line = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        self._say(f"held-out prompts, {phase}: {line}")
        prefixed = {f"eval/{name}": value for name, value in metrics.items()}
        self._run.append(self._run.metrics, [{"iteration": iteration, "phase": phase} | prefixed])
        self._scalars(iteration, prefixed)

    def _say(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def _scalars(self, iteration: int, metrics: dict[str, float]) -> None:
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, iteration)


def print_comparison(before: dict[str, Any], after: dict[str, Any], prompts: int) -> None:
    """A small table of the held-out metrics before and after."""
    table = Table(title=f"{prompts} held-out prompts")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name in before:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}", f"{after[name] - before[name]:+.3f}")
    Console().print(table)

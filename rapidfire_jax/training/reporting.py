"""What a run tells while it runs: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rapidfire_jax.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from rapidfire_jax.training.job import Job

type Headline = tuple[tuple[str, str, str], ...]  # metric, its label, and how its value is written


class Reporter:
    """Writes every iteration's metrics to all sinks. A context manager: the bar and the files are closed at the end."""

    def __init__(self, run: RunDirectory, job: "Job", *, done: int, tensorboard: bool):
        self._run, self._total, self._headline = run, job.iterations, job.headline
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(run.tensorboard), purge_step=done + 1 if done else None)
        self._bar = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn(f"[bold]{job.config.task}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=job.iterations, completed=done)

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
        line = "  ".join(
            _show(label, form.format(metrics[key])) for key, label, form in self._headline if key in metrics
        )
        if self._bar:
            self._bar.update(self._task, completed=iteration, description=line)
        else:
            left = f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d} left"
            self._say(f"iteration {iteration:3d}/{self._total}  {line}  {left}")

    def evaluation(self, iteration: int, phase: str, metrics: dict[str, float]) -> None:
        """Reports an evaluation on the held-out prompts."""
        line = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        self._say(f"held out, {phase}: {line}")
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


def _show(label: str, value: str) -> str:
    return f"{value} {label}" if "/" in label else f"{label} {value}"


def print_comparison(title: str, summary: dict[str, Any]) -> None:
    """A small table of the held-out metrics before and after, and the win rates if there are any."""
    before, after = summary["before"], summary["after"]
    table = Table(title=title)
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name in before:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}", f"{after[name] - before[name]:+.3f}")
    console = Console()
    console.print(table)
    for name, share in summary.get("win_rate", {}).items():
        console.print(f"better than before by {name}: {share:.1%} of the prompts", highlight=False)

"""PNG plots of a run, from the records of its metrics.jsonl."""

from pathlib import Path
from typing import Any

type Plots = dict[str, tuple[str, str, list[str]]]  # file name -> title, unit, metrics

ONLINE_PLOTS: Plots = {
    "reward": ("Mean reward", "reward", ["reward", "eval/reward"]),
    "judge": ("Judge, which nothing is trained on", "mean score", ["eval/judge"]),
    "kl": ("KL to the reference", "nats a response", ["kl", "eval/kl"]),
    "entropy": ("Policy entropy", "nats a token", ["policy/entropy"]),
    "explained_variance": ("Explained variance of the critic", "1 - Var[R - v] / Var[R]", ["value/explained_variance"]),
    "response_length": ("Response length", "tokens", ["response_length", "eval/response_length"]),
}
OFFLINE_PLOTS: Plots = {
    "loss": ("Loss", "mean", ["loss/total", "eval/loss"]),
    "accuracy": ("Accuracy", "share of examples", ["accuracy", "eval/accuracy"]),
    "learning_rate": ("Learning rate", "", ["learning_rate"]),
}


def plot_run(records: list[dict[str, Any]], folder: Path, plots: Plots) -> list[Path]:
    """Draws the metrics that the records have, and the time by phase; returns the files."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure: Figure, name: str) -> None:
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=120)

    for name, (title, unit, keys) in plots.items():
        if not any(key in record for record in records for key in keys):
            continue
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for key in keys:
            points = [(r["iteration"], r[key]) for r in records if key in r]
            held_out = key.startswith("eval/")
            label = "held out" if held_out else "training"
            if points:
                axes.plot(*zip(*points, strict=True), "o--" if held_out else "-", label=label)
        axes.set(title=title, xlabel="iteration", ylabel=unit)
        if name == "explained_variance":
            axes.set_ylim(-1, 1)
        axes.legend()
        axes.grid(alpha=0.3)
        save(figure, name)

    phases = sorted({key for r in records for key in r if key.startswith("seconds/")})
    if phases:
        rows = [r for r in records if phases[0] in r]
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        heights = [[r[phase] for r in rows] for phase in phases]
        axes.stackplot([r["iteration"] for r in rows], *heights, labels=[p.removeprefix("seconds/") for p in phases])
        axes.legend(loc="upper right")
        axes.set(title="Time by phase", xlabel="iteration", ylabel="seconds an iteration")
        save(figure, "time")
    return written

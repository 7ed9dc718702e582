"""AdamW with 8-bit moments against AdamW in float32: the same SFT run twice, loss curves and bytes of state.

    python -m benchmarks.adamw_8bit [--quick]

Every weight of SmolLM2-135M learns film reviews, data and order of `configs/rlhf/sft.yaml`, from the same seed on both
sides. Differences are relative, the largest of any step: of the loss itself, and of its mean over 20 steps. The curves
are drawn to `results/adamw_8bit.png`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.results import FOLDER, report
from rapidfire_jax.config import load_config
from rapidfire_jax.training.offline import OfflineJob

CONFIG = Path(__file__).parents[1] / "configs" / "rlhf" / "sft.yaml"
SETTINGS = [
    "adapter={type: none}",
    "data.max_length=64",
    "sft.batch_size=2",
    "optimizer.learning_rate=5e-5",
    "optimizer.warmup=10",
]
WINDOW = 20  # steps


def run(name: str, steps: int) -> dict[str, Any]:
    """Losses of all steps, bytes of the optimiser's state, and the median seconds a step."""
    job = OfflineJob(load_config(CONFIG, [*SETTINGS, f"optimizer.name={name}", f"training.iterations={steps}"]))
    losses, seconds = [], []
    for iteration in range(steps):
        start = time.perf_counter()
        losses.append(job.iterate(iteration)["loss/total"])
        seconds.append(time.perf_counter() - start)
    state = sum(x.nbytes for x in jax.tree.leaves(job.state.opt_state))
    return {"losses": np.array(losses), "state": state, "seconds": float(np.median(seconds))}


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Mean over the last `WINDOW` steps, from the first step on that has as many."""
    return np.convolve(losses, np.full(WINDOW, 1 / WINDOW), "valid")


def difference(losses: np.ndarray, truth: np.ndarray) -> float:
    """Relative, the largest."""
    return float(np.max(np.abs(losses / truth - 1)))


def draw(curves: dict[str, np.ndarray]) -> None:
    """Both curves, and the difference of the smoothed ones below."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, height_ratios=(3, 1), sharex=True)
    for name, losses in curves.items():
        (line,) = above.plot(range(1, len(losses) + 1), losses, alpha=0.25)
        above.plot(range(WINDOW, len(losses) + 1), smoothed(losses), color=line.get_color(), label=name)
    truth, ours = (smoothed(losses) for losses in curves.values())
    below.plot(range(WINDOW, WINDOW + len(truth)), 100 * (ours / truth - 1), color="black")
    above.set(title="SFT, every weight of SmolLM2-135M", ylabel="loss, nats a token")
    below.set(xlabel="step", ylabel=f"difference of\n{WINDOW}-step means, %")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(FOLDER / "adamw_8bit.png", dpi=120)


def main() -> None:
    """The table and the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 steps, and no curves")
    args = parser.parse_args()
    found = {name: run(name, 40 if args.quick else 300) for name in ("adamw", "adamw_8bit")}
    truth = found["adamw"]
    rows = [
        {
            "optimizer": name,
            "steps": len(own["losses"]),
            "first loss": float(smoothed(own["losses"])[0]),
            "last loss": float(smoothed(own["losses"])[-1]),
            "difference": difference(own["losses"], truth["losses"]),
            "difference of means": difference(smoothed(own["losses"]), smoothed(truth["losses"])),
            "state MB": own["state"] / 1e6,
            "of AdamW's": own["state"] / truth["state"],
            "s a step": own["seconds"],
        }
        for name, own in found.items()
    ]
    report("adamw_8bit", rows)
    if not args.quick:
        draw({name: own["losses"] for name, own in found.items()})


if __name__ == "__main__":
    main()

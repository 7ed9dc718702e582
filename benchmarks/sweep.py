"""How the cost of an iteration of PPO grows with the batch and with the length of responses, beside its work.

    python -m benchmarks.sweep [--quick] [--json]

The model, reward model and settings of `benchmarks.end_to_end`'s `tiny` (every weight trained, prompts of 32 tokens):
batches of 1 to 128 with responses of 32 tokens, and responses of 32 to 1024 tokens in batches of 16. Work is the FLOPs
of all matrix products of the iteration as the plain implementations trace it, loops as often as they go round; scores
that causality hides and slots of the cache that are still empty count. "time / work" compares with the first row of its
kind: above 1, time has grown faster than work. Times are medians of several iterations after the first.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks.end_to_end import COMMON, OURS, SHAPES, Shape, write_models
from benchmarks.peers.rapidfire_ppo import problem
from benchmarks.results import FOLDER, append, command_line, tell
from pallas_kernels import dispatch
from rapidfire_jax.planning.costs import flops

BATCHES, RESPONSES, ROWS = (1, 2, 4, 8, 16, 32, 64, 128), (32, 64, 128, 256, 512, 1024), 16


def measure(shape: Shape, turns: int) -> dict[str, float]:
    """Seconds and FLOPs of an iteration."""
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), shape)
        state, iteration, traced = problem(dataclasses.asdict(shape) | COMMON | OURS | {"folder": folder})
    with dispatch.prefer("xla", "chunked", "scan"):
        work = flops(traced().jaxpr, (shape.response - 1,))
    times = []
    for turn in range(turns + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(iteration(state, jax.random.key(turn)))
        times.append(time.perf_counter() - began)
    return {"s": statistics.median(times[1:]), "GFLOP": work / 1e9}


def series(what: str, values: tuple[int, ...], turns: int) -> list[dict[str, Any]]:
    """A row for each batch or length."""
    rows: list[dict[str, Any]] = []
    for value in values:
        batch, response = (value, RESPONSES[0]) if what == "batch" else (ROWS, value)
        found = measure(dataclasses.replace(SHAPES["tiny"][0], rows=batch, response=response), turns)
        first = rows[0] if rows else found
        time_grew, work_grew = found["s"] / first["s"], found["GFLOP"] / first["GFLOP"]
        rows.append(
            {"what": what, "batch": batch, "response": response}
            | found
            | {"tokens/s": batch * response / found["s"], "GFLOP/s": found["GFLOP"] / found["s"]}
            | {"time": time_grew, "work": work_grew, "time / work": time_grew / work_grew}
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second, and time beside work, of both series."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    for (above, below), what in zip(figure.subplots(2, 2).T, ("batch", "response"), strict=True):
        own = [row for row in rows if row["what"] == what]
        values = [row[what] for row in own]
        above.plot(values, [row["tokens/s"] for row in own], "o-")
        below.plot(values, [row["time"] for row in own], "o-", label="time")
        below.plot(values, [row["work"] for row in own], "--", label="work")
        above.set(ylabel="tokens/s", xscale="log", ylim=(0, None))
        below.set(ylabel="times the first", xlabel=what, xscale="log", yscale="log")
        below.legend()
        for axes in (above, below):
            axes.set_xticks(values, [str(value) for value in values])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Table and plot."""
    args = command_line(__doc__, quick="a third of the sizes, one iteration, and no plot").parse_args()
    step, turns = (3, 1) if args.quick else (1, 3)
    rows = series("batch", BATCHES[::step], turns) + series("response", RESPONSES[::step], turns)
    append("sweep", rows)
    if not args.quick:
        draw(rows, FOLDER / "sweep.png")
    tell(rows, as_json=args.json)


if __name__ == "__main__":
    main()

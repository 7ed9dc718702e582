"""A whole iteration of PPO against TRL 1.12.0: rollout, scoring and update, one after the other on the same cores.

    python -m benchmarks.end_to_end [--quick] [--json] [--shape small] [--sides trl,full] [--price 2.0]

A Llama of random weights (float32, F = 4 D, untied head), a reward model of the same shape, 4 epochs of 1 minibatch,
no EOS, so that every row is a response of full length; both sides load the same files and get the same prompts. Sides:

    trl              every weight, a critic of its own started from the reward model, as in TRL's own example
    trl_lora         its `peft_config`: rank 16 on all linear layers of the policy; it trains every weight of the critic
    trl_lora_critic  the same adapters in the critic too (only if named in --sides)
    full             ours, every weight; the critic is a head on the policy's trunk
    full_recompute   the same, log-probabilities and values computed again instead of taken from the rollout
    lora             rank 16 on all linear layers
    top2             the same on the last 2 layers; what lies below is computed once an iteration
    lean             every weight, with AdamW's state in 8 bits and nothing kept of a layer but its input

Every side is a process that lives through the whole comparison and is stopped while another one runs. "start s" is from
the start of the process to the end of its first iteration; ours is started twice, "first start s" has the compilation
whose programs the second one finds. Figures are medians of the next iterations, which go in turns. One while other
processes took more than 5% of the cores is repeated, 3 times at most; "disturbed" counts those that stayed so. "peak
MB" is the most that the process ever held, "first peak MB" the same of the one that compiled. All sides have the same
learning rate; "s to reward" is the time of the iterations (start-up not counted) until the mean score of 3 in a row
exceeds the mean of all sides' first scores by half their standard deviation, or none; "cost" that time at a price an
hour. TRL runs in an environment that is made once, in `${XDG_CACHE_HOME:-~/.cache}/rapidfire-jax/peers/`.
"""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from benchmarks.results import append, command_line, show
from benchmarks.workers import DISTURBED, THREADS, Worker, peer_python, take_turns
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import CausalLM, RewardModel

WINDOW = 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    prompt: int
    response: int
    learning_rate: float  # of both sides

    @property
    def name(self) -> str:
        """Batch, prompt, response."""
        return f"D {self.width}, L {self.layers}, {self.rows}/{self.prompt}/{self.response}"


SHAPES = {
    "tiny": (Shape(128, 4, 4, 1024, 64, 32, 32, 1e-3), Shape(128, 4, 4, 1024, 32, 64, 128, 1e-3)),
    "small": (Shape(512, 8, 8, 8192, 16, 32, 32, 3e-4), Shape(512, 8, 8, 8192, 16, 64, 128, 3e-4)),
}
COMMON = {"epochs": 4, "temperature": 1.0, "kl_coef": 0.05, "seed": 0, "threads": THREADS}
LORA: dict[str, Any] = {"rank": 16, "alpha": 32, "targets": "all-linear"}
OURS = {"lora": None, "recompute": False, "remat": "products", "optimizer": "adamw"}
SIDES: dict[str, dict[str, Any]] = {
    "trl": {"lora": None},
    "full": OURS,
    "full_recompute": OURS | {"recompute": True},
    "lean": OURS | {"remat": "full", "optimizer": "adamw_8bit"},
    "trl_lora": {"lora": LORA, "critic_lora": False},
    "lora": OURS | {"lora": LORA},
    "top2": OURS | {"lora": LORA | {"layers": 2}},
    "trl_lora_critic": {"lora": LORA, "critic_lora": True},
}
DEFAULT = tuple(SIDES)[:-1]
SHOWN = (
    "shape", "side", "tokens/s", "x trl", "x trl_lora", "s", "rollout s", "scoring s", "update s", "start s", "peak MB",
    "peak / trl's", "first score", "first KL", "to reward", "s to reward", "cost", "disturbed",
)  # fmt: skip


def write_models(folder: Path, shape: Shape) -> None:
    """What both sides load: policy, reward model, prompts without padding.

    The reward model's embedding and its last attention are strong: all tokens of a response count much the same.
    """
    D, N = shape.width, shape.heads
    config = DecoderConfig(shape.vocabulary, D, 4 * D, shape.layers, N, N, D // N, shape.prompt + shape.response)
    save_pretrained(CausalLM(config, rngs=nnx.Rngs(0)), folder / "policy")
    reward = RewardModel(config, rngs=nnx.Rngs(1))
    reward.embedding[...] *= 50.0
    for projection in (reward.blocks.v_proj, reward.blocks.o_proj):
        projection.kernel[...] = projection.kernel[...].at[-1].multiply(32.0)
    save_pretrained(reward, folder / "reward")
    prompts = np.random.default_rng(2).integers(shape.vocabulary, size=(shape.rows, shape.prompt))
    np.save(folder / "prompts.npy", prompts.astype(np.int32))


def start(side: str, folder: Path, shape: Shape) -> Worker:
    """A side on the models and prompts of a folder."""
    theirs = side.startswith("trl")
    settings = dataclasses.asdict(shape) | COMMON | SIDES[side] | {"folder": str(folder)}
    python = peer_python() if theirs else Path(sys.executable)
    return Worker(side, python, "trl_ppo" if theirs else "rapidfire_ppo", settings, folder)


def start_twice(side: str, folder: Path, shape: Shape) -> Worker:
    """A side that finds the programs that an earlier start of it compiled; TRL compiles nothing."""
    if side.startswith("trl"):
        return start(side, folder, shape)
    with start(side, folder, shape) as first:
        answer = first.iterate()
    worker = start(side, folder, shape)
    worker.started |= {"first start s": first.loading + answer["seconds"], "first peak MB": answer["peak MB"]}
    return worker


def compare(shape: Shape, sides: tuple[str, ...], pairs: int, iterations: int) -> list[Worker]:
    """The sides of a shape, with what they answered."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        write_models(folder, shape)
        workers = [stack.enter_context(start_twice(side, folder, shape)) for side in sides]
        take_turns(workers, pairs)
        goal = threshold(workers)
        for worker in workers:
            while reached(worker.answers, goal) is None and len(worker.answers) < iterations:
                worker.iterate()
    return workers


def threshold(workers: list[Any]) -> float:
    """Half a standard deviation above the mean of the first scores, which all come from the same policy."""
    first = [worker.answers[0] for worker in workers]
    spread = statistics.fmean(answer["score_std"] ** 2 for answer in first) ** 0.5
    return statistics.fmean(answer["score"] for answer in first) + 0.5 * spread


def reached(answers: list[dict[str, Any]], goal: float) -> int | None:
    """Iterations until the mean score of the last `WINDOW` exceeds `goal`; None if it never does."""
    scores = [answer["score"] for answer in answers]
    ends = range(WINDOW, len(scores) + 1)
    return next((end for end in ends if statistics.fmean(scores[end - WINDOW : end]) > goal), None)


def rows_of(shape: Shape, workers: list[Any], price: float) -> list[dict[str, Any]]:
    """The table: a row for each side, and ratios to TRL where it is one of them."""
    goal = threshold(workers)
    counted = {worker.side: [answer for answer in worker.answers if answer["counts"]] for worker in workers}
    rows = []
    for worker in workers:

        def median(key: str, side: str = worker.side) -> float | None:
            values = [answer[key] for answer in counted.get(side, []) if key in answer]
            return statistics.median(values) if values else None

        def peak(side: str) -> float | None:
            return next((max(a["peak MB"] for a in w.answers) for w in workers if w.side == side), None)

        seconds, first, steps = median("seconds"), worker.answers[0], reached(worker.answers, goal)
        assert seconds is not None
        to_reward = None if steps is None else steps * seconds
        rows.append(
            {
                "shape": shape.name,
                "side": worker.side,
                "trained M": worker.started["trained"] / 1e6,
                "tokens/s": shape.rows * shape.response / seconds,
                "x trl": _ratio(median("seconds", "trl"), seconds),
                "x trl_lora": _ratio(median("seconds", "trl_lora"), seconds),
                "s": seconds,
                "rollout s": median("rollout s"),
                "scoring s": median("scoring s"),
                "update s": median("update s"),
                "start s": worker.loading + first["seconds"],
                "first start s": worker.started.get("first start s"),
                "peak MB": peak(worker.side),
                "first peak MB": worker.started.get("first peak MB"),
                "peak / trl's": _ratio(peak(worker.side), peak("trl")),
                "first score": first["score"],
                "first std": first["score_std"],
                "first KL": first["kl"],
                "first entropy": first["entropy"],
                "last score": statistics.fmean(answer["score"] for answer in worker.answers[-WINDOW:]),
                "goal": goal,
                "iterations": len(worker.answers),
                "to reward": steps,
                "s to reward": to_reward,
                "price an hour": price,
                "cost": None if to_reward is None else to_reward / 3600 * price,
                "counted": len(counted[worker.side]),
                "disturbed": sum(answer["others"] > DISTURBED for answer in counted[worker.side]),
                "runs on": worker.started["versions"],
            }
        )
    return rows


def headline(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Throughput, memory, time to a reward and cost of `full` and `trl`, for each shape that has both."""
    wanted = {
        "throughput, tokens/s": "tokens/s",
        "peak memory, MB": "peak MB",
        "time to reward, s": "s to reward",
        "cost": "cost",
    }
    found = {(row["shape"], row["side"]): row for row in rows}
    return [
        {
            "shape": shape,
            "what": what,
            "trl": theirs[key],
            "ours": (ours := found[shape, "full"])[key],
            "ours / trl": _ratio(ours[key], theirs[key]),
        }
        for (shape, side), theirs in found.items()
        if side == "trl" and (shape, "full") in found
        for what, key in wanted.items()
    ]


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def main() -> None:
    """Both tables."""
    parser = command_line(__doc__, quick="tiny 64/32/32 alone, one pair, 6 iterations")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="one model instead of both")
    parser.add_argument("--sides", default=",".join(DEFAULT), help=f"any of {', '.join(SIDES)}")
    parser.add_argument("--pairs", type=int, default=3, help="measured iterations of each side")
    parser.add_argument("--iterations", type=int, default=30, help="most iterations of a side, to reach the reward")
    parser.add_argument("--price", type=float, default=2.0, help="of the machine, an hour")
    args = parser.parse_args()
    sides = tuple(args.sides.split(","))
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides: no {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes the workers along
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # the workers inherit it
    shapes = [shape for name in SHAPES if args.shape in (None, name) for shape in SHAPES[name]]
    pairs, iterations = args.pairs, args.iterations
    if args.quick:
        shapes, pairs, iterations = [SHAPES["tiny"][0]], 1, 6
    rows = []
    for shape in shapes:
        found = rows_of(shape, compare(shape, sides, pairs, iterations), args.price)
        append("end_to_end", found)
        rows += found
    if args.json:
        print(json.dumps({"rows": rows, "headline": headline(rows)}))
        return
    show([{name: row[name] for name in SHOWN} for row in rows])
    if table := headline(rows):
        show(table)


if __name__ == "__main__":
    main()

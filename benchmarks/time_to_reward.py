"""How long the quickstart's task takes to a mean reward, against TRL 1.12.0, on whatever device there is.

    python -m benchmarks.time_to_reward [--quick] [--json] [--goal 0.8] [--sides ours,trl] [--price 2.5]

Both sides train the weights of `configs/quickstart.yaml` on its prompts, with its reward and its numbers: LoRA of rank
16 on the last 10 layers, batches of 32, 2 epochs of 2 minibatches, the learning rate falling to 0 over 32 iterations.
TRL's critic is a model of its own with the same adapters and a new head. Its reward model is a module that asks this
process, which answers for both sides' classifier. "s to goal" is the time of the iterations, start-up not counted,
until the mean reward of 3 in a row has reached the goal.
"""

import http.server
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
import yaml

from benchmarks.end_to_end import WINDOW, reached
from benchmarks.results import append, command_line, tell
from benchmarks.workers import THREADS, Worker, peer_python
from rapidfire_jax.config import load_config
from rapidfire_jax.data.prompts import load_prompts
from rapidfire_jax.models.export import convert
from rapidfire_jax.models.tokenizer import load_tokenizer
from rapidfire_jax.rewards.base import load_reward

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"


def prepare(folder: Path, iterations: int) -> tuple[Any, dict[str, Any]]:
    """The reward, and what TRL's side is told; writes the policy, the prompts, and the configuration of ours."""
    tree = yaml.safe_load(QUICKSTART.read_text())
    tree["run_dir"] = str(folder / "run")
    tree["training"] |= {"iterations": iterations}
    (folder / "ours.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / "ours.yaml")
    convert(config.model.name, folder / "policy", dtype="float32", max_shard_bytes=5_000_000_000)
    prompts, _ = load_prompts(
        config.data,
        load_tokenizer(config.model.name),
        seed=config.seed,
        held_out=config.training.eval_prompts,
        max_new_tokens=config.rollout.max_new_tokens,
        context=2048,
    )
    rows = config.rollout.batch_size
    used = [tokens for i in range(iterations) for tokens in prompts.batch(i, rows).tokens]
    (folder / "prompts.json").write_text(json.dumps([list(map(int, tokens)) for tokens in used]))
    lora = {"r": config.adapter.rank, "lora_alpha": config.adapter.alpha}
    settings = {
        "folder": str(folder),
        "threads": THREADS,
        "lora": lora,
        "layers": config.adapter.layers,
        "rows": rows,
        "iterations": iterations,
        "response_length": config.rollout.max_new_tokens,
        "learning_rate": config.optimizer.learning_rate,
        "numbers": {
            "temperature": config.rollout.temperature,
            "kl_coef": config.settings.kl_coef,
            "num_ppo_epochs": config.settings.epochs,
            "num_mini_batches": config.settings.minibatches,
            "vf_coef": config.settings.value_coef,
            "seed": config.seed,
        },
    }
    return load_reward(config.reward), settings


def serve(reward: Any) -> http.server.ThreadingHTTPServer:
    """Answers a POST of texts with their rewards, in a thread."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """A JSON list of texts -> a JSON list of numbers."""
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = reward([""] * len(texts), texts, {}, [[]] * len(texts)).total
            body = json.dumps([float(score) for score in scores]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def run(side: str, folder: Path, settings: dict[str, Any], goal: float, price: float) -> dict[str, Any]:
    """All iterations of a side, and its row."""
    if side == "trl":
        worker = Worker(side, peer_python(), "trl_quickstart", settings, folder)
    else:
        worker = Worker(side, Path(sys.executable), "rapidfire_job", {"config": str(folder / "ours.yaml")}, folder)
    with worker:
        for _ in range(settings["iterations"]):
            worker.iterate()
    steps = reached(worker.answers, goal)
    taken = [answer["seconds"] for answer in worker.answers]
    seconds = None if steps is None else sum(taken[:steps])
    return {
        "side": side,
        "goal": goal,
        "iterations to goal": steps,
        "s to goal": seconds,
        "cost": None if seconds is None else seconds / 3600 * price,
        "s an iteration": sorted(taken)[len(taken) // 2],
        "first s": taken[0],
        "loading s": worker.loading,
        "last reward": sum(answer["score"] for answer in worker.answers[-WINDOW:]) / WINDOW,
        "last kl": sum(answer["kl"] for answer in worker.answers[-WINDOW:]) / WINDOW,
        "device": worker.started["device"],
        "runs on": worker.started["versions"],
    }


def main() -> None:
    """The table."""
    parser = command_line(__doc__, quick="2 iterations")
    parser.add_argument("--goal", type=float, default=0.8, help="mean reward")
    parser.add_argument("--sides", default="ours,trl")
    parser.add_argument("--price", type=float, default=2.5, help="of the machine, an hour")
    args = parser.parse_args()
    if unknown := set(args.sides.split(",")) - {"ours", "trl"}:
        parser.error(f"--sides: no {', '.join(sorted(unknown))}; there are ours, trl")
    jax.config.update("jax_platforms", "cpu")  # of this process alone, which takes no memory of a GPU
    if not Path("/dev/nvidia0").exists():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        reward, settings = prepare(folder, 2 if args.quick else 32)
        settings["url"] = f"http://127.0.0.1:{serve(reward).server_address[1]}"
        rows = [run(side, folder, settings, args.goal, args.price) for side in args.sides.split(",")]
    append("time_to_reward", rows)
    tell(rows, as_json=args.json)


if __name__ == "__main__":
    main()

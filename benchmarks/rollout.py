"""Rollouts alone: against `generate` of PyTorch transformers, and continuous batching against a static loop.

    python -m benchmarks.rollout [--quick] [--json]

Equal lengths: 16 responses of full length to prompts without padding, temperature 1, whole vocabulary; transformers in
float32, ours in float32 and bfloat16. Unequal lengths: 128 prompts, every token ends a response with a probability of 4
over the limit (some tokens of a model of random weights count as EOS), so that lengths are geometric with a mean of
nearly a quarter of it; 16 rows at a time until the last of them has ended, or a decode batch of 16 whose lanes are
filled again. All are processes of their own that go in turns, see `benchmarks.workers`; figures are medians of 3 after
the first.
"""

import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from benchmarks.quantization import MODEL
from benchmarks.results import append, command_line, tell
from benchmarks.workers import DISTURBED, THREADS, Worker, peer_python, take_turns
from rapidfire_jax import FlaxAutoModelForCausalLM
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import CausalLM

ROWS, PROMPTS = 16, 128
SMALL = DecoderConfig(8192, 512, 2048, 8, 8, 8, 64, max_positions=512)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, lengths, and sides by name with what they are told; the first is what the others are compared with."""

    model: str
    prompt: int
    response: int
    sides: dict[str, dict[str, Any]]


def _ours(dtype: str = "float32", **settings: Any) -> dict[str, Any]:
    batch = {"decode_batch_size": None, "one_batch": True, "eos_ids": 0}
    return {"module": "rapidfire_generate", "dtype": dtype} | batch | settings


def _unequal(response: int) -> dict[str, dict[str, Any]]:
    settings = {"one_batch": False, "eos_ids": 4 * SMALL.vocab_size // response}
    return {"static": _ours(**settings), "continuous": _ours(**settings, decode_batch_size=ROWS)}


EQUAL = {
    "transformers": {"module": "hf_generate", "dtype": "float32"},
    "ours": _ours(),
    "ours, bfloat16": _ours("bfloat16"),
}
CASES = (
    Case("small", 32, 32, EQUAL),
    Case("small", 64, 128, EQUAL),
    Case("SmolLM2-135M", 32, 32, EQUAL),
    Case("small", 64, 128, _unequal(128)),
    Case("small", 32, 256, _unequal(256)),
)


def measure(case: Case, turns: int) -> list[dict[str, Any]]:
    """Rows of the table."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder, workers = Path(scratch), []
        small = case.model == "small"
        model = CausalLM(SMALL, rngs=nnx.Rngs(0)) if small else FlaxAutoModelForCausalLM.from_pretrained(MODEL)
        save_pretrained(model, folder / "policy")
        prompts = np.random.default_rng(0).integers(SMALL.vocab_size, size=(PROMPTS, case.prompt))
        np.save(folder / "prompts.npy", prompts.astype(np.int32))
        for side, told in case.sides.items():
            python = peer_python() if told["module"] == "hf_generate" else Path(sys.executable)
            settings = told | {"folder": str(folder), "rows": ROWS, "response": case.response, "threads": THREADS}
            workers.append(stack.enter_context(Worker(side, python, told["module"], settings, folder)))
        take_turns(workers, turns)
    rows, first = [], None
    for worker in workers:
        counted = [answer for answer in worker.answers if answer["counts"]]
        speed = statistics.median(answer["tokens"] / answer["seconds"] for answer in counted)
        first = first or speed
        rows.append(
            {
                "model": case.model,
                "prompt/response": f"{case.prompt}/{case.response}",
                "side": worker.side,
                "tokens/s": speed,
                "x the first": speed / first,
                "s": statistics.median(answer["seconds"] for answer in counted),
                "disturbed": sum(answer["others"] > DISTURBED for answer in counted),
                "runs on": worker.started["versions"],
            }
        )
    return rows


def main() -> None:
    """The table."""
    args = command_line(__doc__, quick="the first case, one turn").parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # the workers inherit it
    rows = []
    for case in CASES[:1] if args.quick else CASES:
        found = measure(case, 1 if args.quick else 3)
        append("rollout", found)
        rows += found
    tell(rows, as_json=args.json)


if __name__ == "__main__":
    main()

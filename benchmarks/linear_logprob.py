"""`linear_logprob` on the CPU, forward and backward: the chunked form against the materialised one, memory and time.

    python -m benchmarks.linear_logprob [--quick]

"MB" is what the compiler says the program needs beside its arguments and results; "resident MB" the most that a process
of its own held above those. Times are medians of several, in turns. Ratios are to the materialised form, and the error
is the gradients' largest difference from it, as a fraction of their largest value. The gradient of the head is a
result, and so counts for neither form.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.results import report
from pallas_kernels import linear_logprob

SIZES = {"full": (2048, 576, 49152), "quick": (1024, 128, 32768)}  # rows, width, vocabulary
FORMS = ("chunked", "reference")


def problem(size: str, form: str, head: str) -> tuple[jax.stages.Compiled, tuple[jax.Array, ...]]:
    """A compiled step with its arguments."""
    rows, width, vocabulary = SIZES[size]
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, width))
    weights = jax.random.normal(keys[1], (vocabulary, width)) * (2 / width**0.5)
    targets = jax.random.randint(keys[2], (rows,), 0, vocabulary)

    def loss(hidden, weights, targets):
        out = linear_logprob(hidden, weights, targets, temperature=0.7, implementation=form)
        return -(out.logp + 0.01 * out.entropy).mean()

    step = jax.jit(jax.grad(loss, argnums=0 if head == "frozen" else (0, 1)))
    args = jax.block_until_ready((hidden, weights, targets))
    return step.lower(*args).compile(), args


def memory(key: str) -> int:
    """Bytes that the process holds, "VmRSS", or held at most, "VmHWM"."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


def resident(size: str, form: str, head: str) -> int:
    """Bytes of one step above its arguments and results, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.linear_logprob", "--resident", size, form, head]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_resident(size: str, form: str, head: str) -> None:
    """What `resident` reads."""
    step, args = problem(size, form, head)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is from here on
    before = memory("VmRSS")
    results = jax.block_until_ready(step(*args))
    print(json.dumps(memory("VmHWM") - before - sum(x.nbytes for x in jax.tree.leaves(results))))


def seconds(step: jax.stages.Compiled, args: tuple[jax.Array, ...]) -> float:
    """Of one call."""
    start = time.perf_counter()
    jax.block_until_ready(step(*args))
    return time.perf_counter() - start


def compare(size: str, head: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each form, with a head that is "trained" or "frozen"."""
    steps = {form: problem(size, form, head) for form in FORMS}
    gradients = [jax.tree.leaves(step(*args)) for step, args in steps.values()]
    error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(*gradients, strict=True))
    del gradients
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(repeats):
        for form in FORMS:
            times[form].append(seconds(*steps[form]))
    found = {
        form: {
            "MB": step.memory_analysis().temp_size_in_bytes / 1e6,
            "resident MB": resident(size, form, head) / 1e6,
            "s": statistics.median(times[form]),
        }
        for form, (step, _) in steps.items()
    }
    truth = found["reference"]
    return [
        {"head": head, "form": form} | own | {f"{key} ratio": own[key] / truth[key] for key in own} | {"error": error}
        for form, own in found.items()
    ]


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller problem, fewer repetitions")
    parser.add_argument("--resident", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resident:
        return print_resident(*args.resident)
    size, repeats = ("quick", 3) if args.quick else ("full", 5)
    report("linear_logprob", [row for head in ("trained", "frozen") for row in compare(size, head, repeats)])


if __name__ == "__main__":
    main()

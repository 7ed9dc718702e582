"""Kernels at the shapes of real models: what they occupy and what they must do. How long they take: `benchmarks.gpu`.

    python -m benchmarks.kernels [OPERATION ...] [--quick] [--json]

Registers a thread, spills and shared memory come from ptxas, compiled for an H100 whether there is one or not (packages
of the dependency group `h100`). FLOPs and bytes are hand counts: the least that any kernel must move (every operand
read once, every result written once), and what this one's tiles move if no cache helps. The floor is the larger of
FLOPs over 990 TFLOP/s and least bytes over 3.35 TB/s.
"""

import argparse
import json
from typing import Any

from benchmarks.results import report
from pallas_kernels import hopper
from pallas_kernels.catalogue import CATALOGUE
from pallas_kernels.shape_specs import Call


def occupied(call: Call) -> list[dict[str, Any]]:
    """A row for each kernel of a call."""
    codes = {code.kernel: code for code in hopper.machine_code(call.function, *call.args)}
    return [
        {
            "call": call.name,
            "kernel": kernel,
            "registers": codes[kernel].registers,
            "spill bytes": codes[kernel].spill_bytes,
            "shared KiB": codes[kernel].shared_bytes / 1024,
            "GFLOP": cost.flops / 1e9,
            "least MB": cost.least_bytes / 1e6,
            "moved MB": cost.moved_bytes / 1e6,
            "floor us": cost.floor * 1e6,
        }
        for kernel, cost in call.costs.items()
    ]


def main() -> None:
    """Prints the tables and keeps their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(CATALOGUE)}; default: all")
    parser.add_argument("--quick", action="store_true", help="8b only")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables; keeps nothing")
    options = parser.parse_args()
    if unknown := set(options.operations) - set(CATALOGUE):
        parser.error(f"no operation {', '.join(sorted(unknown))}; accepted: {', '.join(CATALOGUE)}")
    models = ["8b"] if options.quick else ["1b", "8b", "70b"]
    calls = [
        call for name in options.operations or CATALOGUE for model in models for call in CATALOGUE[name].calls(model)
    ]
    tables = {}
    if missing := hopper.toolchain():
        print(f"no machine code: {'; '.join(missing)}")
    else:
        tables["kernel_code"] = [row for call in calls for row in occupied(call)]
    if options.json:
        print(json.dumps(tables))
    else:
        for name, rows in tables.items():
            report(name, rows)


if __name__ == "__main__":
    main()

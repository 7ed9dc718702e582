"""Rows of figures: printed as a table, and kept in a CSV file with machine, versions and commit."""

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import rich.console
import rich.measure
import rich.table

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "numpy")


def command_line(description: str | None, quick: str) -> argparse.ArgumentParser:
    """A benchmark's options: `--quick`, which does what `quick` says, and `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def tell(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Prints `rows` as the command line wants them."""
    if as_json:
        print(json.dumps(rows))
    else:
        show(rows)


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Prints `rows`, which have the same keys, and appends them to `results/NAME.csv`."""
    show(rows)
    append(name, rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints `rows` as a table."""
    table = rich.table.Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console = rich.console.Console()
    needed = rich.measure.Measurement.get(console, console.options.update(max_width=1000), table).maximum
    # A terminal may wrap the lines, but no figure is cut off.
    rich.console.Console(width=max(console.width, needed)).print(table)


def append(name: str, rows: list[dict[str, Any]]) -> None:
    """Adds `rows` to `results/NAME.csv`."""
    FOLDER.mkdir(exist_ok=True)
    path, new = FOLDER / f"{name}.csv", not (FOLDER / f"{name}.csv").exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *_setting()])
        if new:
            writer.writeheader()
        writer.writerows(row | _setting() for row in rows)


def _setting() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=FOLDER.parent, capture_output=True, text=True, check=False
    )
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        "commit": commit.stdout.strip() or "unknown",
    }

"""The folder of one run: configuration, metrics, samples, plots, checkpoints, final policy."""

import contextlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rapidfire_jax.config import RunConfig, dump_config, load_config
from rapidfire_jax.errors import InputError

PACKAGES = (
    "rapidfire-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "numpy",
    "scikit-learn",
)


class RunDirectory:
    """Paths of a run and the small files in it."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.plots = path / "plots"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.tensorboard = path / "tensorboard"
        self.summary = path / "summary.json"

    @classmethod
    def create(cls, config: RunConfig) -> "RunDirectory":
        """A new folder for `config`. Where `run_dir` holds a run already, a number is appended: nothing is overwritten.

        Raises:
          InputError: the folder cannot be written.
        """
        base = Path(config.run_dir).expanduser()
        path, number = base, 1
        while (path / "config.yaml").exists():
            number += 1
            path = base.with_name(f"{base.name}-{number}")
        run = cls(path.resolve())
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run.config.write_text(dump_config(config), encoding="utf-8")
        except OSError as error:
            raise InputError(f"run_dir {str(path)!r} cannot be written: {error.strerror or error}") from None
        run.write_json("environment.json", _environment())
        return run

    def discard(self) -> None:
        """Takes back what `create` wrote, for a run that could not begin."""
        for path in (self.config, self.path / "environment.json"):
            path.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """An existing run.

        Raises:
          InputError: there is no run in `path`.
        """
        run = cls(Path(path).expanduser().resolve())
        if not run.config.is_file():
            raise InputError(f"{path}: not a run directory (it holds no config.yaml)")
        return run

    def load_config(self) -> Any:
        """The resolved configuration the run was started with."""
        return load_config(self.config)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes a small JSON file, replacing it in one step."""
        temporary = self.path / f".{name}.partial"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.path / name)

    def append(self, path: Path, records: list[dict[str, Any]]) -> None:
        """Appends one JSON line a record."""
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def read(self, path: Path) -> list[dict[str, Any]]:
        """The records of `append`; a last line cut off by a kill is left out."""
        records = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def rewind(self, iteration: int, phases: Collection[str]) -> None:
        """Drops what the checkpoint of `iteration` does not know: later iterations, and evaluations not in `phases`."""
        for path in (self.metrics, self.samples):
            known = [r for r in self.read(path) if r["iteration"] <= iteration and r.get("phase") in {None, *phases}]
            path.unlink(missing_ok=True)
            self.append(path, known)


def _environment() -> dict[str, Any]:
    import jax

    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }

"""Writing a folder so that what stands under its name is always whole."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rapidfire_jax.errors import InputError

MARKS = ("config.json", "adapter_config.json")  # one of these tells an earlier export


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end; it may be new, empty or an earlier export.

    Raises:
      InputError: `folder` holds something else.
    """
    earlier = folder.is_dir() and any((folder / mark).exists() for mark in MARKS)
    if folder.exists() and not earlier and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: holds other files; name a folder that is new, empty or an earlier export")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(Path(scratch, "old"))
        new.rename(folder)

"""From the name of a model, as a user writes it, to files on this machine."""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

from rapidfire_jax.errors import InputError

PACKAGE = "package://"
HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt"]


def resolve(name: str) -> Path:
    """The local file or folder that `name` stands for, downloaded if it is a Hugging Face repository.

    Args:
      name: `package://DISTRIBUTION/PATH/IN/IT`, a file or folder, or `organisation/repository[@revision]`. A name that
        starts with `/`, `./`, `../` or `~`, or ends in `.gguf`, is only ever a path.

    Raises:
      InputError: nothing stands there, or it cannot be reached.
    """
    if name.startswith(PACKAGE):
        return _in_package(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    hub = HUB_ID.fullmatch(name)
    if name.startswith(("/", "./", "../", "~")) or name.endswith(".gguf") or hub is None:
        raise InputError(f"{name}: no such folder or file")
    return _from_hub(name, hub["repository"], hub["revision"])


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is or, if it is a folder without `config.json`, that it holds; None for neither.

    Raises:
      InputError: the folder holds several, or `path` is a file of another kind.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path}: not a model; give a .gguf file, or the folder that holds config.json")
        return path
    found = sorted(path.glob("*.gguf"))
    if not found or (path / "config.json").exists():
        return None
    if len(found) > 1:
        raise InputError(f"{path}: holds {len(found)} GGUF files; name one of {', '.join(f.name for f in found)}")
    return found[0]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      InputError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _in_package(name: str) -> Path:
    distribution, _, inside = name.removeprefix(PACKAGE).partition("/")
    if not distribution or not inside:
        raise InputError(f"{name}: write {PACKAGE}DISTRIBUTION/PATH/IN/IT")
    try:
        path = Path(str(importlib.metadata.distribution(distribution).locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{name}: package {distribution!r} is not installed; pip install {distribution}") from None
    if not path.exists():
        version = importlib.metadata.version(distribution)
        raise InputError(f"{name}: {inside!r} is not in {distribution} {version} (looked for {path})")
    return path


def _from_hub(name: str, repository: str, revision: str | None) -> Path:
    import huggingface_hub  # only those who download wait for it

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of these
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name}: no such folder or file here, and not a hub repository that could be reached "
            f"({type(error).__name__}: {reason})"
        ) from None

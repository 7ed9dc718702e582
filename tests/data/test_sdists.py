"""Files out of source distributions: one download, whole files, and nothing outside the cache."""

import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from rapidfire_jax.data import sdists
from rapidfire_jax.data.records import locate
from rapidfire_jax.errors import InputError


def archive(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, content in files.items():
                packed.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            packed.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("thing-1.0/link.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        packed.addfile(link)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/rapidfire-jax/sdists"


@pytest.fixture(params=["thing-1.0.tar.gz", "thing-1.0.zip"])
def downloads(request: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that pip was called with; it leaves an archive."""
    files = {"thing-1.0/data/a.csv": b"text\na\n", "thing-1.0/../../../evil": b"x", "thing-1.0/data/": b""}
    packed = archive(tmp_path / request.param, files)
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        shutil.copy(packed, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sdists.subprocess, "run", run)
    return commands


def test_is_downloaded_once(downloads: list[list[str]], cache: Path) -> None:
    path = locate("sdist://Thing==1.0/data/a.csv")
    assert path == cache / "thing-1.0/data/a.csv"
    assert path.read_text() == "text\na\n"
    assert locate("sdist://thing==1.0/data/a.csv") == path
    assert len(downloads) == 1
    assert downloads[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert "Thing==1.0" in downloads[0]
    assert not any("://" in word for word in downloads[0])
    assert [p for p in cache.rglob("*") if p.is_file()] == [path]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sdist://thing==1.0/data/b.csv", "no file 'data/b.csv' in it; it holds "),
        ("sdist://thing==1.0/data", "no file 'data' in it"),
        ("sdist://thing==1.0/link.csv", "no file 'link.csv' in it"),
    ],
)
def test_what_is_not_in_it(downloads: list[list[str]], cache: Path, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        locate(name)
    assert not [p for p in cache.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "name",
    [
        "sdist://thing/data/a.csv",
        "sdist://thing==1.0",
        "sdist://thing==1.0/",
        "sdist://thing==1.0/../evil",
        "sdist://thing==1.0/data/../../evil",
        "sdist://thing==1.0//etc/passwd",
        "sdist://../thing==1.0/a",
        "sdist://--index==1.0/a",
        "sdist://thing @ x==1.0/a",
    ],
)
def test_bad_names_reach_nobody(downloads: list[list[str]], name: str) -> None:
    with pytest.raises(InputError, match="write sdist://NAME==VERSION/PATH/IN/IT"):
        locate(name)
    assert not downloads


def test_without_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdists.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sdists.shutil, "which", lambda name: "/bin/pip3" if name == "pip3" else None)
    assert sdists._pip() == ["/bin/pip3"]
    monkeypatch.setattr(sdists.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="needs pip; install it with"):
        locate("sdist://thing==1.0/a.csv")


def test_what_pip_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: x\nERROR: No matching distribution found for thing==1.0\n"
    monkeypatch.setattr(
        sdists.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)
    )
    with pytest.raises(InputError, match=r"could not download thing==1\.0: ERROR: No matching distribution"):
        locate("sdist://thing==1.0/a.csv")


def test_broken_archives(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        whole = archive(tmp_path / "whole.tar.gz", {"thing-1.0/a.csv": bytes(range(256)) * 500})
        content = whole.read_bytes()
        (Path(command[command.index("--dest") + 1]) / "thing-1.0.tar.gz").write_bytes(content[: len(content) // 2])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sdists.subprocess, "run", run)
    with pytest.raises(InputError, match="is not a whole archive"):
        locate("sdist://thing==1.0/a.csv")
    assert not [p for p in cache.rglob("*") if p.is_file()]

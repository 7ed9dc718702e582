"""A hub of model repositories on this machine, with the HTTP that downloads need, and a process that downloads."""

import hashlib
import json
import re
import select
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import unquote

TOKEN = "hf_good"
ROUTE = re.compile(
    r"(?P<api>/api/models)?/(?P<repository>[^/]+/[^/]+)"
    r"(/(?P<what>revision|tree|resolve)/(?P<revision>[^/]+)(/(?P<file>.+))?)?"
)


@dataclass
class Repository:
    """Files by commit, and the commits that branches and tags point at."""

    access: Literal["open", "gated", "private"] = "open"
    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


CLIENT = """
import json, os, sys, traceback
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.sources import resolve

for line in sys.stdin:
    name, revision, os.environ["HF_TOKEN"] = json.loads(line)
    try:
        answer = str(resolve(name, revision))
    except InputError as error:
        answer = f"InputError: {error}"
    except Exception:
        answer = traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


class FakeHub(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1 inside a `with` block. `log` lists what was asked for, as "GET /path"."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.log: list[str] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def push(
        self,
        repository: str,
        *names: str,
        revision: str = "main",
        access: Literal["open", "gated", "private"] = "open",
    ) -> str:
        """Makes files that hold their own name and revision the content of a branch or tag; the commit."""
        files = {name: f"{name} of {revision}".encode() for name in names}
        commit = _sha1(repr(files).encode())
        entry = self.repositories.setdefault(repository, Repository(access))
        entry.revisions[revision] = commit
        entry.commits[commit] = files
        return commit

    def answer(self, path: str, authorization: str | None) -> tuple[bytes, dict[str, str]]:
        """Body and headers for `path`.

        Raises:
          Refused: anything but 200.
        """
        route = ROUTE.fullmatch(path)
        if route is None:
            raise Refused(404, "no such page")
        allowed = authorization == f"Bearer {TOKEN}"
        if authorization and not allowed:
            raise Refused(401, "Invalid credentials in Authorization header")
        entry = self.repositories.get(route["repository"])
        if entry is None or (entry.access == "private" and not allowed):
            raise Refused(404 if allowed else 401, "Repository not found", "RepoNotFound")
        revision = unquote(route["revision"] or "main")
        commit = entry.revisions.get(revision, revision)
        if commit not in entry.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = entry.commits[commit]
        if route["api"] and route["what"] == "tree":
            return _json([_tree_entry(name, content) for name, content in files.items()]), {}
        if route["api"]:
            siblings = [{"rfilename": name} for name in files]
            return _json({"id": route["repository"], "sha": commit, "siblings": siblings}), {}
        if entry.access == "gated" and not allowed:
            raise Refused(401, f"Access to model {route['repository']} is restricted", "GatedRepo")
        file = unquote(route["file"] or "")
        if file not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        return files[file], {"ETag": f'"{_sha1(files[file])}"', "X-Repo-Commit": commit}


class HubClient:
    """`resolve` in a process of its own, because huggingface_hub reads its settings when it is imported."""

    def __init__(self, endpoint: str, home: Path, **settings: str):
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **settings}
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def resolve(self, name: str, revision: str | None = None, token: str = "") -> Path:
        """The path for `name`."""
        answer = self._ask(name, revision, token)
        assert answer.startswith("/"), answer
        return Path(answer)

    def refusal(self, name: str, revision: str | None = None, token: str = "") -> str:
        """What the `InputError` for `name` says after the name."""
        answer = self._ask(name, revision, token)
        start = f"InputError: {name}: "
        assert answer.startswith(start), answer
        return answer.removeprefix(start)

    def _ask(self, *question: str | None) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answered, _, _ = select.select([self._process.stdout], [], [], 30)
        assert answered, "no answer in 30 s"
        return json.loads(self._process.stdout.readline())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.log.append(f"{self.command} {path}")
        try:
            body, headers = self.server.answer(path, self.headers["Authorization"])
            status = 200
        except Refused as refused:
            body, status = _json({"error": refused.message}), refused.status
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """The server's log is enough."""


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _sha1(content)}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()

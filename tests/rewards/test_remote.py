"""Rewards from a real HTTP server on this machine: order, retries, and what is said when it fails."""

import contextlib
import json
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from rapidfire_jax.config import RewardConfig
from rapidfire_jax.errors import InputError
from rapidfire_jax.rewards import remote
from rapidfire_jax.rewards.base import load_reward

PROMPTS = [f"p{i}" for i in range(7)]
RESPONSES = ["x" * i for i in range(7)]
COLUMNS = {"answer": tuple("abcdefg"), "entry": [{"n": i} for i in range(7)]}

type Answer = tuple[int, dict[str, str], Any]  # status, headers, body: bytes, or what is sent as JSON


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Server:
    """Answers each request with what `answer(body, number of the request)` returns, and remembers the requests."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer]):
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.requests.append((dict(handler.headers), body))
                    number = len(self.requests) - 1
                    self.at_once += 1
                    self.most_at_once = max(self.most_at_once, self.at_once)
                status, headers, content = answer(body, number)
                with lock:
                    self.at_once -= 1
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                with contextlib.suppress(OSError):  # a client that no longer waits
                    handler.send_response(status)
                    for name, value in ({"Content-Length": str(len(content))} | headers).items():
                        handler.send_header(name, value)
                    handler.end_headers()
                    handler.wfile.write(content)

            def log_message(handler, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score"


@contextlib.contextmanager
def serving(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()


def lengths(body: dict[str, Any], number: int = 0) -> Answer:
    return 200, {}, {"scores": [len(text) for text in body["responses"]]}


def score(url: str, **settings: Any) -> np.ndarray:
    reward = load_reward([RewardConfig(url=url, **({"batch_size": 3} | settings))])
    return reward(PROMPTS, RESPONSES, COLUMNS).components["url"]


def test_requests() -> None:
    with serving(lengths) as server:
        scores = score(server.url + "?v=2", headers={"X-Mine": "yes"}, concurrency=1)
    np.testing.assert_array_equal(scores, np.arange(7, dtype=np.float32), strict=True)
    first, _, last = (body for _, body in server.requests)
    assert first == {
        "prompts": ["p0", "p1", "p2"],
        "responses": ["", "x", "xx"],
        "columns": {"answer": ["a", "b", "c"], "entry": [{"n": 0}, {"n": 1}, {"n": 2}]},
    }
    assert last["prompts"] == ["p6"] and last["columns"] == {"answer": ["g"], "entry": [{"n": 6}]}
    headers = server.requests[0][0]
    assert headers["X-Mine"] == "yes" and headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("form", [lambda s: {"scores": s}, lambda s: {"rewards": s, "extra": 1}, lambda s: s])
def test_forms_of_the_answer(form: Any) -> None:
    with serving(lambda body, _: (200, {}, form([0.5] * len(body["responses"])))) as server:
        np.testing.assert_array_equal(score(server.url), [0.5] * 7)


def test_nothing_to_score() -> None:
    with serving(lengths) as server:
        assert load_reward([RewardConfig(url=server.url)])([], [], {}).total.shape == (0,)
    assert not server.requests


def test_answers_in_any_order() -> None:
    def later_first(body: dict[str, Any], number: int) -> Answer:
        time.sleep(0.05 * (7 - len(body["responses"][0])))
        return lengths(body)

    with serving(later_first) as server:
        np.testing.assert_array_equal(score(server.url, batch_size=1, concurrency=3), np.arange(7))
    assert server.most_at_once == 3


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_that_fails_twice(status: int) -> None:
    def flaky(body: dict[str, Any], number: int) -> Answer:
        return (status, {}, b"not yet") if number < 2 else lengths(body)

    with serving(flaky) as server:
        np.testing.assert_array_equal(score(server.url, batch_size=7, retries=2), np.arange(7))
        assert len(server.requests) == 3
    with serving(flaky) as server, pytest.raises(InputError) as caught:
        score(server.url, batch_size=7, retries=1)
    assert str(caught.value).startswith(
        f"reward {server.url}: rows 0 to 6: no scores after 2 attempts; the last: {status} "
    )
    assert str(caught.value).endswith(": not yet")


@pytest.mark.parametrize("status", [429, 503])
def test_waits_as_long_as_the_server_asks(status: int) -> None:
    def busy(body: dict[str, Any], number: int) -> Answer:
        return (status, {"Retry-After": "0.4"}, b"") if number == 0 else lengths(body)

    with serving(busy) as server:
        began = time.perf_counter()
        score(server.url, batch_size=7)
        assert 0.4 <= time.perf_counter() - began < 3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("0", 0.0), ("99999", 300.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", None), ("", None)],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert remote._retry_after(remote.httpx.Response(429, headers={"Retry-After": value})) == seconds


def test_a_slow_server() -> None:
    def slow(body: dict[str, Any], number: int) -> Answer:
        time.sleep(0.6 if number == 0 else 0.0)
        return lengths(body)

    with serving(slow) as server:
        np.testing.assert_array_equal(score(server.url, batch_size=7, timeout=0.2), np.arange(7))
        assert len(server.requests) == 2
    with (
        serving(slow) as server,
        pytest.raises(InputError, match=r"no scores after one attempt; the last: ReadTimeout"),
    ):
        score(server.url, batch_size=7, timeout=0.2, retries=0)


def test_no_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    began = time.perf_counter()
    with pytest.raises(InputError, match=rf"reward {url}: rows 0 to 2: no scores after 4 attempts; the last: ConnectE"):
        score(url)
    assert time.perf_counter() - began < 5


def test_a_refused_request_is_not_sent_again() -> None:
    with (
        serving(lambda body, _: (422, {}, b"no such column: " + b"y" * 1000)) as server,
        pytest.raises(InputError, match=r"rows 0 to 6: 422 Unprocessable \w+: no such column: y{184}$"),
    ):
        score(server.url, batch_size=7)
    assert len(server.requests) == 1
    with serving(lambda body, _: (302, {"Location": "/"}, b"")) as server, pytest.raises(InputError, match="302 Found"):
        score(server.url)


def test_one_failure_ends_the_waiting_of_the_others() -> None:
    def mixed(body: dict[str, Any], number: int) -> Answer:
        return (400, {}, b"bad") if body["prompts"][0] == "p0" else (503, {"Retry-After": "60"}, b"")

    with serving(mixed) as server:
        began = time.perf_counter()
        with pytest.raises(InputError, match="rows 0 to 2: 400 Bad Request: bad"):
            score(server.url)
        assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>", "rows 0 to 6: the answer is not JSON: <html>"),
        (b"", "rows 0 to 6: the answer is not JSON: an empty body"),
        (b"\xff\xfe", "rows 0 to 6: the answer is not JSON"),
        ({"score": [0.0] * 7}, r'rows 0 to 6: expected {"scores": \[...\]}, .* or a list, found {"score": \[0'),
        ({"scores": 0.5}, "rows 0 to 6: expected .*, found"),
        (0.5, "rows 0 to 6: expected .*, found 0.5"),
        ([0.0] * 6, "rows 0 to 6: 6 scores for 7 responses"),
        ([0.0] * 6 + ["1"], "row 6: '1' is not a number"),
        ([0.0] * 6 + [None], "row 6: None is not a number"),
        ([[0.0]] * 7, r"row 0: \[0.0\] is not a number"),
        ([0.0] * 5 + [float("nan"), 0.0], "row 5: nan is not a finite float32"),
        ([0.0, 1e60] + [0.0] * 5, r"row 1: 1e\+60 is not a finite float32"),
    ],
)
def test_answers_that_are_no_scores(content: Any, said: str) -> None:
    with serving(lambda body, _: (200, {}, content)) as server, pytest.raises(InputError, match=f"^reward .*: {said}"):
        score(server.url, batch_size=7)
    assert len(server.requests) == 1


def test_rows_are_counted_over_the_whole_batch() -> None:
    def third_is_none(body: dict[str, Any], number: int) -> Answer:
        return 200, {}, [None if prompt == "p5" else 0.0 for prompt in body["prompts"]]

    with serving(third_is_none) as server, pytest.raises(InputError, match=f"reward {server.url}: row 5: None is not"):
        score(server.url)


def test_columns_that_are_not_json() -> None:
    reward = load_reward([RewardConfig(url="http://127.0.0.1:1/")])
    for value in (float("nan"), {1, 2}):
        with pytest.raises(InputError, match="column 'odd' cannot be written as JSON"):
            reward(["p"], ["r"], {"fine": ["x"], "odd": [value]})


def test_environment_variables_in_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret-token")
    monkeypatch.setenv("TENANT", "me")
    with serving(lengths) as server:
        score(server.url, headers={"Authorization": "Bearer ${TOKEN}", "Who": "${TENANT}/${TENANT}"}, batch_size=7)
    headers = server.requests[0][0]
    assert headers["Authorization"] == "Bearer s3cret-token" and headers["Who"] == "me/me"


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("TOKEN", value)
    with pytest.raises(InputError, match="header Authorization: the environment variable TOKEN is not set"):
        load_reward([RewardConfig(url="http://h/x?key=s3cret", headers={"Authorization": "Bearer ${TOKEN}"})])


def test_messages_hold_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("s3cret", "pl4in-key", "qu3ry-key")
    monkeypatch.setenv("TOKEN", "s3cret")
    settings = {"headers": {"Authorization": "Bearer ${TOKEN}", "X-Key": "pl4in-key"}, "retries": 0}

    def repeats(status: int) -> Callable[[dict[str, Any], int], Answer]:
        return lambda body, _: (status, {}, b"Bearer s3cret, pl4in-key and qu3ry-key are not welcome")

    def check(url: str) -> None:
        with pytest.raises(InputError) as caught:
            score(f"{url}?key={secrets[-1]}", **settings)
        told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
        assert "127.0.0.1" in told
        assert not [secret for secret in secrets if secret in told]

    for status in (200, 401, 500):
        with serving(repeats(status)) as server:
            check(server.url)
    with serving(lambda body, _: (200, {}, ["s3cret"] * len(body["prompts"]))) as server:
        check(server.url)
    check("http://127.0.0.1:1/")
    monkeypatch.setenv("TOKEN", "s3cret\n127.0.0.1")
    check("http://127.0.0.1:1/")
    assert "s3cret" not in repr(remote.RemoteReward.load(RewardConfig(url="http://h?s3cret=1")))

"""Rewards from an HTTP server.

One request scores a part of a batch. It carries `{"prompts": [...], "responses": [...], "columns": {name: [...]}}`;
the answer is `{"scores": [...]}`, `{"rewards": [...]}` or the list itself, one number a response in the same order.
"""

import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import numpy as np

from rapidfire_jax.config import RewardConfig
from rapidfire_jax.config.reward import VARIABLE
from rapidfire_jax.errors import InputError
from rapidfire_jax.rewards.values import check_numbers

FIRST_WAIT = 0.5  # seconds before the second attempt; doubled for each further one
LONGEST_WAIT = 30.0
LONGEST_RETRY_AFTER = 300.0  # of what a server may ask for
TOO_MANY_REQUESTS = 429
SECRET = 6  # characters; shorter words of a header or of a query are taken for no secret


@dataclass(frozen=True)
class RemoteReward:
    """A server that scores, the requests it is sent, and what is done when it does not answer."""

    url: str = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)  # what no message may hold
    batch_size: int
    timeout: float
    retries: int
    concurrency: int

    @classmethod
    def load(cls, config: RewardConfig) -> "RemoteReward":
        """Fills in the environment variables of the headers; asks the server nothing.

        Raises:
          InputError: an address that cannot be, or a variable that is not set or whose value no header can hold.
        """
        assert config.url is not None
        where = f"reward {_shown(config.url)}"
        try:
            httpx.URL(config.url)
        except httpx.InvalidURL as error:
            raise InputError(f"{where}: {error}") from None
        headers, secrets = {}, []
        words = [value for _, value in parse_qsl(urlsplit(config.url).query)]
        for name, text in config.headers.items():
            for variable in VARIABLE.findall(text):
                value = os.environ.get(variable)
                if not value:
                    raise InputError(f"{where}: header {name}: the environment variable {variable} is not set")
                if not value.isascii() or not value.isprintable():
                    raise InputError(f"{where}: header {name}: {variable} holds a character that no header can hold")
                secrets.append(value)
            headers[name] = VARIABLE.sub(lambda match: os.environ[match[1]], text)
            words += headers[name].split()
        secrets += [word for word in words if len(word) >= SECRET]
        return cls(
            url=config.url,
            headers=headers,
            secrets=tuple(sorted(set(secrets), key=len, reverse=True)),
            batch_size=config.batch_size,
            timeout=config.timeout,
            retries=config.retries,
            concurrency=config.concurrency,
        )

    @property
    def name(self) -> str:
        """The address without its query, which may hold a key."""
        return f"reward {_shown(self.url)}"

    def __call__(
        self,
        prompts: list[str],
        responses: list[str],
        columns: Mapping[str, Sequence[Any]],
        response_tokens: Sequence[Sequence[int]] | None = None,
    ) -> np.ndarray:
        """One number a response, float32 [B]; `response_tokens` are not sent.

        A request is sent again, after a wait that doubles, when the server cannot be reached, does not answer in time,
        is busy (429) or fails (5xx); where it says `Retry-After`, that is the wait.

        Raises:
          InputError: no answer after all retries, another status, or an answer that is not one finite number a
            response.
        """
        bodies = list(self._bodies(prompts, responses, columns))
        firsts = range(0, len(responses), self.batch_size)
        limits = httpx.Limits(max_connections=self.concurrency)
        stop = threading.Event()
        with (
            httpx.Client(timeout=self.timeout, limits=limits) as client,
            ThreadPoolExecutor(self.concurrency, thread_name_prefix="reward") as pool,
        ):
            try:
                answers = pool.map(
                    lambda body, first: self._score(client, body, first, len(responses), stop), bodies, firsts
                )
                return np.concatenate([np.zeros(0, np.float32), *answers])
            finally:
                stop.set()

    def _bodies(
        self, prompts: list[str], responses: list[str], columns: Mapping[str, Sequence[Any]]
    ) -> Iterator[bytes]:
        for first in range(0, len(responses), self.batch_size):
            rows = slice(first, first + self.batch_size)
            part = {name: list(values[rows]) for name, values in columns.items()}
            for name, values in part.items():
                try:
                    json.dumps(values, allow_nan=False)
                except (TypeError, ValueError) as error:
                    raise InputError(f"{self.name}: column {name!r} cannot be written as JSON: {error}") from None
            body = {"prompts": prompts[rows], "responses": responses[rows], "columns": part}
            yield json.dumps(body).encode()

    def _score(self, client: httpx.Client, body: bytes, first: int, total: int, stop: threading.Event) -> np.ndarray:
        last = min(first + self.batch_size, total)
        where = f"{self.name}: rows {first} to {last - 1}"
        answer = self._post(client, body, where, stop)
        try:
            values = answer.json()
        except ValueError:
            raise InputError(f"{where}: the answer is not JSON: {self._excerpt(answer)}") from None
        if isinstance(values, dict):
            values = values.get("scores", values.get("rewards"))
        if not isinstance(values, list):
            expected = '{"scores": [...]}, {"rewards": [...]} or a list'
            raise InputError(f"{where}: expected {expected}, found {self._excerpt(answer)}")
        if len(values) != last - first:
            raise InputError(f"{where}: {len(values)} scores for {last - first} responses")
        for row, value in enumerate(values, start=first):
            if isinstance(value, list | dict | str) or value is None:
                raise InputError(f"{self.name}: row {row}: {self._safe(repr(value)):.100} is not a number")
        return check_numbers(self.name, values, last - first, first=first)

    def _post(self, client: httpx.Client, body: bytes, where: str, stop: threading.Event) -> httpx.Response:
        """The answer to a request; waits between attempts end when `stop` is set."""
        jitter = random.Random()  # of its own: rewards may count on the seed of the global one
        for attempt in range(self.retries + 1):
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * jitter.uniform(0.5, 1.5)
            try:
                answer = client.post(
                    self.url, content=body, headers={"Content-Type": "application/json"} | self.headers
                )
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {self._safe(str(error)) or 'no reason given'}"
            else:
                if answer.is_success:
                    return answer
                problem = f"{answer.status_code} {answer.reason_phrase}: {self._excerpt(answer)}"
                if answer.status_code != TOO_MANY_REQUESTS and not answer.is_server_error:
                    raise InputError(f"{where}: {problem}")
                asked = _retry_after(answer)
                wait = wait if asked is None else asked
            if attempt < self.retries and stop.wait(wait):
                break
        attempts = f"{self.retries + 1} attempts" if self.retries else "one attempt"
        raise InputError(f"{where}: no scores after {attempts}; the last: {problem}")

    def _excerpt(self, answer: httpx.Response) -> str:
        """The first 200 characters of an answer, without secrets that the server repeats."""
        return self._safe(answer.text)[:200] or "an empty body"

    def _safe(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def _shown(url: str) -> str:
    return urlsplit(url)._replace(query="", fragment="").geturl()


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds that the server asks to wait, given as a number or as a date."""
    value = answer.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        seconds = float(value)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)

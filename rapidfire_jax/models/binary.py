"""Walking through a binary file without holding it in memory."""

import contextlib
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rapidfire_jax.errors import InputError


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file, mapped for as long as the context lasts.

    Raises:
      InputError: unreadable or empty.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise InputError(f"{path}: cannot read: {error}") from None
    with data:
        yield data


class Cursor:
    """A position in a file that never moves beyond its end; `what` names in errors that which stands there."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def take(self, length: int, what: str) -> int:
        """Moves over `length` bytes; where they start."""
        start, self.at = self.at, self.at + length
        if self.at > self.size:
            raise InputError(
                f"{self.path}: the file is cut short: {what} should end at byte {self.at}, but there are {self.size}"
            )
        return start

    def number(self, code: str, what: str) -> Any:
        """A number, by its `struct` code."""
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code), what))[0]

    def text(self, length: int, what: str) -> str:
        """`length` bytes of UTF-8."""
        start = self.take(length, what)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what} is not UTF-8: {error}") from None

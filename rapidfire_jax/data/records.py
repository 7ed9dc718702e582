"""CSV, JSONL, JSON and plain text files as records."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rapidfire_jax.data.sdists import SDIST, fetch
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.sources import PACKAGE, resolve

Record = dict[str, Any]
Rows = Iterator[tuple[int, Record]]  # each record with its row number

LINE_BREAK = "<br />"


def locate(name: str) -> Path:
    """The path behind `package://DISTRIBUTION/FILE` or `sdist://NAME==VERSION/FILE`, or `name` with `~` expanded.

    Raises:
      InputError: the package or the file in it does not exist.
    """
    if name.startswith(SDIST):
        return fetch(name)
    return resolve(name) if name.startswith(PACKAGE) else Path(name).expanduser()


def read_records(path: Path, where: Mapping[str, str], columns: Iterable[str] = ()) -> dict[int, dict[str, str]]:
    """The records of a file that match `where`, by row number, every value as text.

    Every record has the same keys. JSON values that are not strings are given as their JSON text, absent ones and null
    as "". Rows are numbered as by `iterate`.

    Args:
      path: a .csv, .jsonl, .json or .txt file in UTF-8.
      where: column -> value; rows with another value are left out.
      columns: further columns that must exist.

    Raises:
      InputError: missing, empty or malformed file, another ending, a missing column, or no row that matches.
    """
    records = {row: {key: as_text(value) for key, value in record.items()} for row, record in iterate(path)}
    if not records:
        raise InputError(f"{path}: holds no records")
    found = list(dict.fromkeys(key for record in records.values() for key in record))
    check_columns(str(path), (*where, *columns), found)
    full = {row: {key: record.get(key, "") for key in found} for row, record in records.items()}
    matching = {row: record for row, record in full.items() if matches(record, where)}
    if not matching:
        raise InputError(f"{path}: none of {len(records):,} records has {dict(where)}")
    return matching


def iterate(path: Path) -> Rows:
    """The records of a file one by one, in its order.

    Fields of a CSV file are text, those of JSON what they say. A `.txt` file is one prompt a line, under the key
    "prompt". A row number counts as an editor or a spreadsheet does: lines of a JSONL or text file from 1, records of a
    CSV file from 2, its header being row 1. Records of a JSON array count from 1.

    Raises:
      InputError: a file that cannot be read, another ending, or a malformed row.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: cannot read {path.suffix or 'a file without an ending'}; give {', '.join(READERS)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot read the data: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from None


def check_columns(name: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Refuses data without one of the wanted columns.

    Raises:
      InputError: naming the column and those found.
    """
    found = list(found)
    for column in wanted:
        if column not in found:
            raise InputError(f"{name}: no column {column!r}; it has {', '.join(map(repr, found))}")


def matches(record: Mapping[str, Any], where: Mapping[str, str]) -> bool:
    """Whether every column of `where` has, as text, the value given there."""
    return all(as_text(record.get(column)) == value for column, value in where.items())


def as_text(value: object) -> str:
    """A string as it is, nothing for None, and the JSON text of any other value."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def clean(text: str, words: int | None = None) -> str:
    """`text`, or its first `words` words, with `<br />` tags and every run of white space as one space."""
    return " ".join(text.replace(LINE_BREAK, " ").split(None, -1 if words is None else words)[:words])


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            for row, fields in enumerate(filter(None, reader), start=2):
                if len(fields) != len(header):
                    raise InputError(f"{path}: row {row} has {len(fields)} fields, the header {len(header)}")
                yield row, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num} is not CSV: {error}") from None


def _read_jsonl(path: Path) -> Rows:
    for row, line in _lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {row} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}: line {row} is a JSON {type(value).__name__}; give one object a line")
        yield row, value


def _read_json(path: Path) -> Rows:
    """An array of objects or, as many `.json` files are, one object a line."""
    with path.open(encoding="utf-8-sig") as file:
        if not file.read(4096).lstrip().startswith("["):
            yield from _read_jsonl(path)
            return
        file.seek(0)
        try:
            values = json.loads(file.read().removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON: {error}") from None
    for row, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{path}: row {row} is a JSON {type(value).__name__}; give an array of objects")
        yield row, value


def _read_txt(path: Path) -> Rows:
    for row, line in _lines(path):
        yield row, {"prompt": line}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as file:
        yield from ((row, line.strip()) for row, line in enumerate(file, start=1) if line.strip())


READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
}

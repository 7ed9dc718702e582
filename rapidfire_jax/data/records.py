"""CSV, JSONL and plain text files as records of strings."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.sources import PACKAGE, resolve

Record = dict[str, str]

LINE_BREAK = "<br />"


def locate(name: str) -> Path:
    """The path behind `package://DISTRIBUTION/FILE`, or `name` itself with `~` expanded.

    Raises:
      InputError: the package or the file in it does not exist.
    """
    return resolve(name) if name.startswith(PACKAGE) else Path(name).expanduser()


def read_records(path: Path, where: Mapping[str, str], columns: Iterable[str] = ()) -> dict[int, Record]:
    """The records of a file that match `where`, by row number.

    A row number counts as an editor or a spreadsheet does: lines of a JSONL or text file from 1, records of a CSV file
    from 2, its header being row 1. Every record has the same keys. JSON values that are not strings are given as their
    JSON text, absent ones and null as "". A `.txt` file is one prompt a line, under the key "prompt".

    Args:
      path: a .csv, .jsonl or .txt file in UTF-8.
      where: column -> value; rows with another value are left out.
      columns: further columns that must exist.

    Raises:
      InputError: missing, empty or malformed file, another ending, a missing column, or no row that matches.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".txt": _read_txt}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: cannot read {path.suffix or 'a file without an ending'}; give {', '.join(readers)}")
    try:
        records = dict(reader(path))
    except OSError as error:
        raise InputError(f"{path}: cannot read the data: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from None
    if not records:
        raise InputError(f"{path}: holds no records")

    found = list(dict.fromkeys(key for record in records.values() for key in record))
    for column in (*where, *columns):
        if column not in found:
            raise InputError(f"{path}: no column {column!r}; it has {', '.join(map(repr, found))}")
    full = {row: {key: record.get(key, "") for key in found} for row, record in records.items()}
    matching = {row: record for row, record in full.items() if all(record[key] == where[key] for key in where)}
    if not matching:
        raise InputError(f"{path}: none of {len(records):,} records has {dict(where)}")
    return matching


def clean(text: str, words: int | None = None) -> str:
    """`text`, or its first `words` words, with `<br />` tags and every run of white space as one space."""
    return " ".join(text.replace(LINE_BREAK, " ").split(None, -1 if words is None else words)[:words])


def _read_csv(path: Path) -> Iterator[tuple[int, Record]]:
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


def _read_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    for row, line in _lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {row} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}: line {row} is a JSON {type(value).__name__}; give one object a line")
        yield row, {key: _text(item) for key, item in value.items()}


def _read_txt(path: Path) -> Iterator[tuple[int, Record]]:
    for row, line in _lines(path):
        yield row, {"prompt": line}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as file:
        yield from ((row, line.strip()) for row, line in enumerate(file, start=1) if line.strip())


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

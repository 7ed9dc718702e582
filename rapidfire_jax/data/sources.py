"""Where records come from: files, folders, the Hugging Face hub, or a function."""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidfire_jax.config.data import DEFAULT_SPLIT, DataConfig
from rapidfire_jax.config.functions import find_function
from rapidfire_jax.data.records import READERS, Record, Rows, check_columns, iterate, locate, matches
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.sources import HUB_ID

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder


@dataclass(frozen=True)
class Source:
    """Records that can be gone through again and again, in the same order each time.

    `name` stands in messages, `where` says which records are wanted, and `read()` goes through all of them.
    """

    name: str
    where: Mapping[str, str]
    read: Callable[[], Rows]

    def in_memory(self) -> dict[int, Record]:
        """The wanted records by row number, each with every column; absent values are None.

        Raises:
          InputError: unreadable, without records, without a column of `where`, or no record is wanted.
        """
        rows = dict(self.read())
        if not rows:
            raise InputError(f"{self.name}: holds no records")
        names = dict.fromkeys(name for record in rows.values() for name in record)
        check_columns(self.name, self.where, names)
        wanted = {row: record for row, record in rows.items() if matches(record, self.where)}
        if not wanted:
            raise InputError(f"{self.name}: none of {len(rows):,} records has {dict(self.where)}")
        return {row: {name: record.get(name) for name in names} for row, record in wanted.items()}

    def first(self) -> tuple[int, Record]:
        """The first record, wanted or not, with its row number.

        Raises:
          InputError: unreadable, without records, or without a column of `where`.
        """
        for row, record in self.read():
            check_columns(self.name, self.where, record)
            return row, record
        raise InputError(f"{self.name}: holds no records")

    def stream(self) -> Rows:
        """The wanted records one by one, with their row numbers; `InputError` where one cannot be read."""
        return ((row, record) for row, record in self.read() if matches(record, self.where))


def open_source(config: DataConfig) -> Source:
    """The records that `config` names.

    Local `.csv`, `.jsonl`, `.json` and `.txt` files are read as by `records.iterate`; `.parquet` and `.arrow` files,
    folders and hub repositories by Hugging Face `datasets`, whose settings count (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE,
    HF_DATASETS_CACHE). Those rows, and those of a function, are numbered from 1. A folder is what `save_to_disk` wrote,
    or holds data files. A stream has the columns of its first record. One of a function calls it anew each epoch; it
    must then give the same records.

    Raises:
      InputError: nothing stands there, it cannot be read, or a setting has no effect on it.
    """
    if config.function is not None:
        return _from_function(config)
    assert config.path is not None
    path = locate(config.path)
    ending = path.suffix.lower()
    known = ending in READERS or ending in BUILDERS
    hub = HUB_ID.fullmatch(config.path)
    if not path.exists() and not known and hub and not hub["file"] and not config.path.startswith(("./", "../", "~")):
        name = hub["repository"]
        return _from_datasets(config, config.path, lambda: _load(config, name, hub["revision"], config.subset))
    if config.subset is not None:
        raise InputError(f"{path}: data.subset={config.subset!r} has no effect; only repositories of the hub have them")
    if path.is_dir():
        saved = any((path / file).is_file() for file in SAVED)
        return _from_datasets(config, str(path), lambda: _load_saved(config, path) if saved else _load(config, path))
    if not path.exists():
        raise InputError(f"{path}: cannot read the data: No such file or directory")
    if ending in BUILDERS:
        return _from_datasets(config, str(path), lambda: _load(config, BUILDERS[ending], data_files=str(path)))
    if ending not in READERS:
        endings = ", ".join((*READERS, *BUILDERS))
        raise InputError(f"{path}: cannot read {ending or 'a file without an ending'}; give {endings} or a folder")
    if config.split != DEFAULT_SPLIT:
        raise InputError(f"{path}: data.split={config.split!r} has no effect; the file has no splits")
    return Source(str(path), config.where, lambda: iterate(path))


def _from_datasets(config: DataConfig, name: str, load: Callable[[], Any]) -> Source:
    loaded: list[Any] = []

    def read() -> Rows:
        with _explained(name):
            if not loaded:
                loaded.append(load())
            yield from enumerate(loaded[0], start=1)

    return Source(name, config.where, read)


def _load(
    config: DataConfig, name: str | Path, revision: str | None = None, subset: str | None = None, **files: str
) -> Any:
    """A `Dataset`, or an `IterableDataset` where the configuration wants a stream."""
    import datasets  # takes a second

    return datasets.load_dataset(
        str(name), subset, split=config.split, revision=revision, streaming=config.streaming, **files
    )


def _load_saved(config: DataConfig, folder: Path) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if config.split not in saved:
            raise InputError(f"{folder}: no split {config.split!r}; it has {', '.join(map(repr, saved))}")
        return saved[config.split]
    if config.split not in (DEFAULT_SPLIT, str(saved.split)):
        raise InputError(f"{folder}: data.split={config.split!r} has no effect; it was saved without splits")
    return saved


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What `datasets` raises, which has no base in common, as an `InputError`."""
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except Exception as error:
        cause = error
        while cause.__cause__ is not None and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        reason = f"{type(error).__name__}: {error}" if cause is error else f"{error}: {type(cause).__name__}: {cause}"
        absent = "no such folder or file here, and no hub data set that could be read"
        what = "cannot read the data" if Path(name).exists() else absent
        raise InputError(f"{name}: {what} ({textwrap.shorten(reason, 500, placeholder=' ...')})") from None


def _from_function(config: DataConfig) -> Source:
    name = f"data.function {config.function}"
    function = find_function(config.function or "", name)
    try:
        signature = inspect.signature(function)
        signature.bind(**config.args)
    except TypeError as error:
        raise InputError(f"{name}: data.args: {error}; it takes {signature}") from None

    def read() -> Rows:
        try:
            records = function(**config.args)
            if not isinstance(records, Iterable) or isinstance(records, str | Mapping):
                raise InputError(f"{name} returned {type(records).__name__}; give an iterable of dicts")
            for row, record in enumerate(records, start=1):
                if not isinstance(record, Mapping) or not all(isinstance(key, str) for key in record):
                    raise InputError(f"{name}: row {row} is {record!r:.100}; give a dict of column -> value")
                yield row, dict(record)
        except (InputError, GeneratorExit):
            raise
        except Exception as error:
            raise InputError(f"{name} raised {type(error).__name__}: {error}") from error

    return Source(name, config.where, read)

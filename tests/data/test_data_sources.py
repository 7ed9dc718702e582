"""Files, folders, repositories and functions give the same records, and say what is wrong with them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rapidfire_jax.config.data import DataConfig
from rapidfire_jax.data.sources import open_source
from rapidfire_jax.errors import InputError

CHAT = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "🙂"}]
RECORDS = [{"text": f"text {i}", "label": i % 2, "messages": CHAT, "note": None if i else "x"} for i in range(5)]


def records(*args: Any, **config: Any) -> list[dict[str, Any]]:
    """What there is in memory; a stream must hold the same."""
    source = open_source(DataConfig(*args, **config))
    found = source.in_memory()
    if not config.get("streaming"):
        stream = open_source(DataConfig(*args, **config, streaming=True))
        assert list(stream.stream()) == list(stream.stream()) == list(found.items())
    return list(found.values())


def refusal(**config: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_source(DataConfig(**config)).in_memory()
    return str(caught.value)


def save(hf: Any, folder: Path) -> dict[str, str]:
    """The records in every form on disk."""
    table = hf.Dataset.from_list(RECORDS)
    table.to_parquet(folder / "a.parquet")
    table.save_to_disk(folder / "saved")
    hf.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(folder / "splits")
    (folder / "shards").mkdir()
    for i in range(5):
        table.select([i]).to_parquet(folder / "shards" / f"train-{i}.parquet")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    (folder / "a.json").write_text(json.dumps(RECORDS))
    arrow = next((folder / "saved").glob("*.arrow"))
    forms = {name: str(folder / name) for name in ("a.parquet", "saved", "splits", "shards", "a.jsonl", "a.json")}
    return forms | {"arrow": str(arrow)}


def test_every_form_holds_the_same_records(tmp_path: Path, hf: Any) -> None:
    forms = save(hf, tmp_path)
    for name, path in forms.items():
        assert records(path=path) == RECORDS, name
        assert records(path=path, where={"label": "1", "note": ""}) == [RECORDS[1], RECORDS[3]], name
    assert records(path=forms["splits"], split="test") == [RECORDS[1]]
    assert list(open_source(DataConfig(path=forms["a.parquet"], split="train[:2]")).in_memory()) == [1, 2]


def test_what_is_said_of_files_and_folders(tmp_path: Path, hf: Any) -> None:
    forms = save(hf, tmp_path)
    assert refusal(path=forms["splits"], split="dev").endswith("splits: no split 'dev'; it has 'train', 'test'")
    assert "data.split='dev' has no effect; it was saved without splits" in refusal(path=forms["saved"], split="dev")
    assert "data.split='dev' has no effect; the file has no splits" in refusal(path=forms["a.jsonl"], split="dev")
    assert "a.parquet: cannot read the data (ValueError: Unknown split" in refusal(path=forms["a.parquet"], split="dev")
    assert "data.subset='en' has no effect; only repos" in refusal(path=forms["a.parquet"], subset="en")
    assert "no column 'source'; it has 'text', 'label'" in refusal(path=forms["a.parquet"], where={"source": "x"})
    assert "none of 5 records has {'label': '2'}" in refusal(path=forms["a.parquet"], where={"label": "2"})
    (tmp_path / "bad.parquet").write_text("PAR1, they say")
    assert "bad.parquet: cannot read the data (" in refusal(path=str(tmp_path / "bad.parquet"))
    (tmp_path / "empty").mkdir()
    assert "empty: cannot read the data (" in refusal(path=str(tmp_path / "empty"))
    (tmp_path / "a.xls").touch()
    assert "a.xls: cannot read .xls; give .csv, .jsonl, .json, .txt, .parquet, .arrow or" in refusal(
        path=str(tmp_path / "a.xls")
    )
    hf.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "none.parquet")
    assert "corresponds to no data" in refusal(path=str(tmp_path / "none.parquet"))


@pytest.mark.parametrize("name", ["/none/a.csv", "./a/b", "~/none", "folder/none.parquet", "word", "a/b/c"])
def test_what_is_not_there_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "cannot read the data: No such file" in refusal(path=name)


def test_repositories_of_the_hub(hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **keywords: Any) -> Any:
        asked.append((args, keywords))
        return hf.Dataset.from_list(RECORDS)

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    assert records(path="org/name") == RECORDS
    assert records(path="org/name@refs/pr/1", subset="en", split="test[:10%]", streaming=True) == RECORDS
    assert asked == [
        (("org/name", None), {"split": "train", "revision": None, "streaming": False}),
        (("org/name", None), {"split": "train", "revision": None, "streaming": True}),
        (("org/name", "en"), {"split": "test[:10%]", "revision": "refs/pr/1", "streaming": True}),
    ]


def test_without_the_hub(tmp_path: Path) -> None:
    code = (
        "from rapidfire_jax.data.sources import open_source; from rapidfire_jax.config.data import DataConfig\n"
        "from rapidfire_jax.errors import InputError\n"
        "import sys, rapidfire_jax.data.examples; assert 'datasets' not in sys.modules  # takes a second\n"
        "for streaming in (False, True):\n"
        "    try: open_source(DataConfig(path='org/none@v1', streaming=streaming)).first()\n"
        "    except InputError as error: print(error)"
    )
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("org/none@v1: no such folder or file here, and no hub data set that could be read (")
        assert "ffline" in line


FUNCTIONS = """
def pairs(count, start=0):
    return [{"text": f"text {i}"} for i in range(start, start + count)]
def generated(count):
    yield from pairs(count)
def number(): return 3
def word(): return "word"
def lines(): return ["a", "b"]
def numbered(): return [{1: "a"}]
def nothing(): return []
def fails():
    yield {"text": "a"}
    raise KeyError("b")
"""


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_records.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    assert records(function="my_records:pairs", args={"count": 2, "start": 3}) == [
        {"text": "text 3"},
        {"text": "text 4"},
    ]
    assert records(function="my_records:generated", args={"count": 2}, where={"text": "text 1"}) == [{"text": "text 1"}]
    for function, said in (
        ("none_such:f", "cannot import 'none_such'"),
        ("my_records:pear", "no function 'pear'; did you mean 'pairs'?"),
        ("my_records:xyz", "no function 'xyz'; it has 'pairs', 'generated'"),
        ("my_records:pairs", "data.args: missing a required argument: 'count'; it takes (count, start=0)"),
        ("my_records:number", "returned int; give an iterable of dicts"),
        ("my_records:word", "returned str; give an iterable of dicts"),
        ("my_records:lines", "row 1 is 'a'; give a dict of column -> value"),
        ("my_records:numbered", "row 1 is {1: 'a'}; give a dict"),
        ("my_records:nothing", "holds no records"),
        ("my_records:fails", "raised KeyError: 'b'"),
    ):
        assert said in refusal(function=function)
    assert "unexpected keyword argument 'n'" in refusal(function="my_records:pairs", args={"count": 1, "n": 2})


def test_mixed_schemas(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b": [2]}\n')
    source = open_source(DataConfig(path=str(path)))
    assert source.in_memory() == {1: {"a": 1, "b": None}, 2: {"a": None, "b": [2]}}

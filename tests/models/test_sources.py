import time

import pytest

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.sources import gguf_file, read_json, resolve


def test_file_and_folder(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.touch()
    assert [resolve(str(tmp_path)), resolve(str(file))] == [tmp_path, file]
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(f"{tmp_path.name}/m.gguf").samefile(file)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/m.gguf") == file


def test_package():
    assert resolve("package://numpy/numpy/__init__.py").name == "__init__.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package://no-such-thing/a.gguf", "'no-such-thing' is not installed; pip install no-such-thing"),
        ("package://numpy/none.gguf", "'none.gguf' is not in numpy 2"),
        ("package://numpy", "write package://DISTRIBUTION/PATH/IN/IT"),
        ("package:///a", "write package://DISTRIBUTION/PATH/IN/IT"),
        ("/none/here", "/none/here: no such folder or file"),
        ("./here", "no such folder or file"),
        ("../up/here", "no such folder or file"),
        ("~/none", "no such folder or file"),
        ("models/none.gguf", "no such folder or file"),
        ("runs/a/final", "no such folder or file"),
        ("word", "no such folder or file"),
    ],
)
def test_what_is_not_there_is_refused_at_once(name, message, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the network"))
    start = time.monotonic()
    with pytest.raises(InputError, match=message):
        resolve(name)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(("name", "revision"), [("org/model-1.5B", None), ("org/model-1.5B@refs/pr/3", "refs/pr/3")])
def test_hub(name, revision, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def download(repository, **options):
        calls.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve(name) == tmp_path
    (repository, options), *rest = calls
    assert (repository, options["revision"], rest) == ("org/model-1.5B", revision, [])
    assert {"*.json", "*.safetensors", "*.jinja"} <= set(options["allow_patterns"])


def test_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*_, **__):
        raise LocalEntryNotFoundError("Got: ConnectError\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        InputError, match=r"org/model: no such folder or file here, and not a hub repository that could be"
    ):
        resolve("org/model")


def test_gguf_file(tmp_path):
    assert gguf_file(tmp_path) is None
    (tmp_path / "b.gguf").touch()
    assert gguf_file(tmp_path) == gguf_file(tmp_path / "b.gguf") == tmp_path / "b.gguf"
    (tmp_path / "a.gguf").touch()
    with pytest.raises(InputError, match=r"holds 2 GGUF files; name one of a\.gguf, b\.gguf"):
        gguf_file(tmp_path)
    (tmp_path / "config.json").touch()
    assert gguf_file(tmp_path) is None
    with pytest.raises(InputError, match=r"config\.json: not a model"):
        gguf_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot read as JSON"), ("[1]", "expected a JSON object, found list")]
)
def test_read_json_errors(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "c.json")

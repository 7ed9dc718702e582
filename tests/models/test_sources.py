import socket
import time

import pytest

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.sources import gguf_file, read_json, resolve
from tests.helpers.fake_hub import TOKEN, FakeHub, HubClient

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
FLAX_SHARDS = (
    "flax_model-00001-of-00002.msgpack",
    "flax_model-00002-of-00002.msgpack",
    "flax_model.msgpack.index.json",
)


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with HubClient(hub.endpoint, tmp_path_factory.mktemp("home")) as client:
        yield client


def fetched(hub, repository):
    """The files whose content was asked for."""
    return sorted(line.split("/", 5)[5] for line in hub.log if line.startswith(f"GET /{repository}/resolve/"))


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
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("went to the network"))
    start = time.monotonic()
    with pytest.raises(InputError, match=message):
        resolve(name)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("repository", "wanted", "others"),
    [
        (
            "org/safetensors-1.5B",
            ("config.json", *TOKENIZER, *SHARDS, "additional_chat_templates/tools.jinja"),
            (
                "pytorch_model.bin",
                "flax_model.msgpack",
                "m.gguf",
                "onnx/model.safetensors",
                "consolidated.safetensors",
            ),
        ),
        ("org/flax", ("config.json", *TOKENIZER, "flax_model.msgpack"), ("pytorch_model.bin", "m.gguf", "README.md")),
        ("org/flax-shards", ("config.json", *FLAX_SHARDS), ("pytorch_model.bin", "onnx/model.safetensors")),
        ("org/adapter", ("adapter_config.json", "adapter_model.safetensors"), ("adapter_model.bin", "README.md")),
        ("org/tokenizer", TOKENIZER, ("pytorch_model.bin", "README.md")),
    ],
)
def test_hub_weights_of_one_kind(hub, client, repository, wanted, others):
    hub.push(repository, *others, *wanted)
    folder = client.resolve(repository)
    files = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert files == {name: f"{name} of main" for name in wanted}
    assert fetched(hub, repository) == sorted(wanted)


def test_hub_only_gguf(hub, client):
    hub.push("org/gguf", "config.json", "README.md", "pytorch_model.bin", "m.Q8_0.gguf")
    assert client.resolve("org/gguf").read_text() == "m.Q8_0.gguf of main"
    assert fetched(hub, "org/gguf") == ["m.Q8_0.gguf"]


def test_hub_several_gguf(hub, client):
    hub.push("org/ggufs", "config.json", "b.gguf", "a.gguf", "bf16/c.gguf", revision="v1")
    refusal = client.refusal("org/ggufs@v1")
    assert refusal == "holds 3 GGUF files, a.gguf, b.gguf, bf16/c.gguf; name one, as in org/ggufs/a.gguf@v1"
    assert client.refusal("org/ggufs/d.gguf", "v1").startswith("the repository holds no d.gguf; its GGUF files: a.gguf")
    assert fetched(hub, "org/ggufs") == []
    assert client.resolve(refusal.split()[-1]).read_text() == "a.gguf of v1"
    assert client.refusal("org/ggufs", "v1") == refusal  # whatever is in the cache
    assert client.resolve("org/ggufs/bf16/c.gguf", "v1").read_text() == "bf16/c.gguf of v1"
    assert fetched(hub, "org/ggufs") == ["a.gguf", "bf16/c.gguf"]


def test_hub_named_gguf_beside_other_weights(hub, client):
    hub.push("org/mixed", "config.json", "m.gguf", "flax_model.msgpack")
    assert client.resolve("org/mixed/m.gguf").read_text() == "m.gguf of main"
    assert fetched(hub, "org/mixed") == ["m.gguf"]
    assert (client.resolve("org/mixed") / "flax_model.msgpack").exists()


def test_hub_revisions(hub, client):
    for revision in ("main", "refs/pr/3", "v1"):
        commit = hub.push("org/revisions", "model.safetensors", revision=revision)
    for name, revision, expected in (
        ("org/revisions", None, "main"),
        ("org/revisions@refs/pr/3", None, "refs/pr/3"),
        ("org/revisions", "v1", "v1"),
        ("org/revisions@refs/pr/3", "v1", "refs/pr/3"),
        (f"org/revisions@{commit}", None, "v1"),
    ):
        found = client.resolve(name, revision) / "model.safetensors"
        assert found.read_text() == f"model.safetensors of {expected}"
    for name, revision in (("org/revisions@v2", None), ("org/revisions", "v2"), ("org/revisions/m.gguf@v2", None)):
        assert client.refusal(name, revision) == "the repository has no revision 'v2'"


def test_hub_cache(hub, client):
    hub.push("org/cache", "config.json", "model.safetensors")
    hub.push("org/cache-gguf", "m.gguf")
    first = [client.resolve("org/cache"), client.resolve("org/cache-gguf")]
    assert fetched(hub, "org/cache") and fetched(hub, "org/cache-gguf")
    hub.log.clear()
    assert [client.resolve("org/cache"), client.resolve("org/cache-gguf")] == first
    assert fetched(hub, "org/cache") == fetched(hub, "org/cache-gguf") == []
    hub.push("org/cache", "config.json", "model.safetensors", "tokenizer.json")
    assert (client.resolve("org/cache") / "tokenizer.json").exists()
    assert fetched(hub, "org/cache") == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"), ({}, "Connection refused")],
    ids=["offline", "unreachable"],
)
def test_without_the_hub(tmp_path, settings, reason):
    names = ("org/folder@v1", "org/gguf", "org/ggufs/b.gguf")
    with FakeHub() as hub, HubClient(hub.endpoint, tmp_path) as client:
        hub.push("org/folder", "config.json", "model.safetensors", revision="v1")
        hub.push("org/gguf", "config.json", "m.gguf")
        hub.push("org/ggufs", "a.gguf", "b.gguf")
        downloaded = [client.resolve(name) for name in names]
    with HubClient(hub.endpoint, tmp_path, **settings) as client:
        assert [client.resolve(name) for name in names] == downloaded
        start = time.monotonic()
        for name in ("org/none", f"org/none@{'0' * 40}", "org/none/m.gguf", "org/ggufs/a.gguf", "org/folder@v2"):
            refusal = client.refusal(name)
            assert refusal.startswith("no such folder or file here, and not a hub repository that could be reached (")
            assert reason in refusal
        assert time.monotonic() - start < 5


def test_interrupted_download(tmp_path):
    with FakeHub() as hub, HubClient(hub.endpoint, tmp_path) as client:
        hub.push("org/folder", *SHARDS)
        (client.resolve("org/folder") / SHARDS[0]).unlink()
    with HubClient(hub.endpoint, tmp_path, HF_HUB_OFFLINE="1") as client:
        assert f"1 file(s) are missing ({SHARDS[0]})" in client.refusal("org/folder")


def test_hub_that_does_not_answer(tmp_path):
    with FakeHub() as hub, HubClient(hub.endpoint, tmp_path) as client:
        hub.push("org/folder", "model.safetensors")
        downloaded = client.resolve("org/folder")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with HubClient(endpoint, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1") as client:
            start = time.monotonic()
            assert client.resolve("org/folder") == downloaded
            assert "could be reached (ReadTimeout: " in client.refusal("org/none")
            assert time.monotonic() - start < 6


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ("gated", "the repository is gated: ask for access at {page} and set HF_TOKEN to a token that has it"),
        ("private", "or a private one: set HF_TOKEN to a token that may read it"),
    ],
    ids=["gated", "private"],
)
def test_hub_token(hub, client, access, message):
    for repository, file in ((f"org/{access}", ""), (f"org/{access}-gguf", "/m.gguf")):
        hub.push(repository, "config.json", "m.gguf" if file else "model.safetensors", access=access)
        refusal = client.refusal(repository + file)
        assert refusal.endswith(message.format(page=f"{hub.endpoint}/{repository}"))
        assert "Invalid credentials" in client.refusal(repository + file, token="hf_wrong")
        assert fetched(hub, repository) == []
        assert client.resolve(repository + file, token=TOKEN)


def test_no_such_hub_repository(client):
    for token in ("", TOKEN):
        assert client.refusal("org/none", token=token).startswith("no such folder or file here, and no such hub")


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

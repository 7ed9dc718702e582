import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization, traverse_util

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.flax_msgpack import open_flax_msgpack

GOLDEN = Path(__file__).parents[1] / "golden/flax"
TREE = {
    "model": {"embed": {"embedding": np.arange(12, dtype=np.float32).reshape(4, 3)}, "norm": {"weight": np.ones(3)}},
    "head": {"kernel": np.arange(6, dtype=np.float16).reshape(3, 2), "bias": np.arange(2).astype(ml_dtypes.bfloat16)},
}


def write(folder, tree, name="flax_model.msgpack"):
    """`tree` as Flax writes it, or bytes as they are; the folder."""
    data = tree if isinstance(tree, bytes) else serialization.to_bytes(tree)
    (folder / name).write_bytes(data)
    return folder


def write_shards(folder, shards, weight_map=None):
    names = {name: write(folder, tree, name) and tree for name, tree in shards.items()}
    if weight_map is None:
        weight_map = {path: name for name, tree in names.items() for path in traverse_util.flatten_dict(tree, sep="/")}
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_reads_as(found, arrays):
    """That `found` holds just `arrays`, given by PyTorch's name."""
    assert found.shapes == {name: array.shape for name, array in arrays.items()}
    assert found.dtypes == {name: array.dtype for name, array in arrays.items()}
    for name, array in arrays.items():
        value = found.read(name)
        assert value.dtype == array.dtype, name
        np.testing.assert_array_equal(value, array, name)


def in_torch_names(tree):
    renamed = {}
    for (*modules, leaf), array in traverse_util.flatten_dict(tree).items():
        name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
        renamed[".".join([*modules, name])] = np.asarray(array).T if leaf == "kernel" else np.asarray(array)
    return renamed


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "gpt2", "llama_bfloat16"])
def test_every_tensor_of_the_golden_files(family):
    tree = serialization.msgpack_restore((GOLDEN / family / "flax_model.msgpack").read_bytes())
    found = open_flax_msgpack(GOLDEN / family)
    assert found.where == GOLDEN / family / "flax_model.msgpack"
    assert_reads_as(found, in_torch_names(tree))
    dtype = ml_dtypes.bfloat16 if family == "llama_bfloat16" else np.float32
    assert set(found.dtypes.values()) == {np.dtype(dtype)}


def test_names_and_axes_are_those_of_pytorch():
    llama, gpt2 = open_flax_msgpack(GOLDEN / "llama").shapes, open_flax_msgpack(GOLDEN / "gpt2").shapes
    assert llama["model.embed_tokens.weight"] == llama["lm_head.weight"] == (64, 32)
    assert llama["model.layers.1.self_attn.k_proj.weight"] == (16, 32)
    assert llama["model.layers.1.mlp.down_proj.weight"] == (32, 48)
    assert llama["model.norm.weight"] == (32,)
    assert gpt2["transformer.h.0.attn.c_attn.weight"] == (32, 96)  # GPT-2 stores [in, out] in PyTorch
    assert gpt2["transformer.h.0.mlp.c_fc.bias"] == (48,)
    assert gpt2["transformer.h.0.ln_1.weight"] == gpt2["transformer.ln_f.bias"] == (32,)


def test_shards_hold_what_the_single_file_holds():
    sharded, single = open_flax_msgpack(GOLDEN / "llama_sharded"), open_flax_msgpack(GOLDEN / "llama")
    assert sharded.where.name == "flax_model.msgpack.index.json"
    assert len(list((GOLDEN / "llama_sharded").glob("*.msgpack"))) >= 3
    assert_reads_as(sharded, {name: single.read(name) for name in single.shapes})


def test_kernels_are_views_of_the_array_that_was_read():
    assert not open_flax_msgpack(GOLDEN / "llama").read("lm_head.weight").flags.c_contiguous


@pytest.mark.parametrize("limit", [4, 10, 16, 10_000])
def test_chunked_arrays(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", limit)
    data = serialization.to_bytes(TREE)
    assert (b"__msgpack_chunked_array__" in data) == (limit < 48)
    assert_reads_as(open_flax_msgpack(write(tmp_path, data)), in_torch_names(TREE))


def test_sizes_on_both_sides_of_every_length_of_msgpack(tmp_path):
    tree = {f"{n}": {"weight": np.arange(n, dtype=np.float16)} for n in [0, 1, 2, 7, 100, 127, 128, 300, 32767, 33000]}
    tree |= {"deep" * 20: {"k" * 300: {f"n{i}": np.float32(i) for i in range(20)}}}  # str8, str16, map16, scalars
    tree |= {"empty": np.ones((1, 0, 300)), "one": np.ones((1, 1, 1, 1), np.float16)}  # uint16 in the shape
    assert_reads_as(open_flax_msgpack(write(tmp_path, tree)), in_torch_names(tree))


def test_map_of_more_than_65535_arrays(tmp_path):
    array = msgpack.packb(msgpack.ExtType(1, msgpack.packb(((2,), "float16", bytes(4)))))
    items = b"".join(msgpack.packb(str(i)) + array for i in range(66_000))
    found = open_flax_msgpack(write(tmp_path, b"\xdf" + struct.pack(">I", 66_000) + items))
    assert list(found.shapes) == [str(i) for i in range(66_000)]


def test_the_single_file_comes_first(tmp_path):
    write_shards(tmp_path, {"a.msgpack": {"a": np.ones(2)}})
    write(tmp_path, {"b": np.ones(3)})
    assert open_flax_msgpack(tmp_path).shapes == {"b": (3,)}


def test_every_truncation_is_reported(tmp_path):
    whole = serialization.to_bytes(TREE)
    write(tmp_path, b"")
    with pytest.raises(InputError, match=r"flax_model\.msgpack: cannot read: cannot mmap an empty file"):
        open_flax_msgpack(tmp_path)
    for length in range(1, len(whole)):
        write(tmp_path, whole[:length])
        with pytest.raises(InputError, match=r"flax_model\.msgpack: the file is cut short: .* should end at byte"):
            open_flax_msgpack(tmp_path)


def test_truncation_names_the_tensor(tmp_path):
    write(tmp_path, serialization.to_bytes(TREE)[:-1])
    with pytest.raises(InputError, match="'head/bias' should end at byte"):
        open_flax_msgpack(tmp_path)


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    found = open_flax_msgpack(write(tmp_path, {"a": np.ones(3)}))
    write(tmp_path, serialization.to_bytes({"a": np.ones(3)})[:-1])
    with pytest.raises(InputError, match=r"flax_model\.msgpack: cut short since it was opened"):
        found.read("a")


def extension(code, *parts):
    return msgpack.ExtType(code, b"".join(map(msgpack.packb, parts)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "starts with msgpack kind 'integer', expected 'map'"),
        (b"\x80\x04\x95\x10\x00", "not a Flax checkpoint: it ends at byte 1, the file at 5"),  # a pickle
        (b"\xc1" + bytes(10), "starts with msgpack kind 'code 0xc1'"),
        (serialization.to_bytes({"a": np.ones(2)}) + b"\0", "not a Flax checkpoint: it ends at byte"),
        (serialization.to_bytes(np.ones(2)), "starts with msgpack kind 'extension'"),
        (b"\x81\xa1a" * 5000 + b"\x80", "nested too deeply"),
        (msgpack.packb({"a": {"b": b"1234"}}), "'a/b' is of msgpack kind 'byte string'; expected an array or a map"),
        (msgpack.packb({"a": [1.0, 2.0]}), "'a' is of msgpack kind 'list'"),
        (msgpack.packb({"a": {"b": 0.5}}), "'a/b' is of msgpack kind 'code 0xcb'"),
        (msgpack.packb({"a": None}), "'a' is of msgpack kind 'nil'"),
        (msgpack.packb({"step": 7}), "'step' is the number 7; expected an array"),
        (msgpack.packb({"a": {7: 1}}), "in 'a/key 0': found msgpack kind 'integer', expected 'string'"),
        (b"\x81\xa1\xff\x80", "'key 0' is not UTF-8"),
        (msgpack.packb({"a": extension(2, (1.0, 2.0))}), r"'a' is a msgpack extension of type 2; accepted: 1"),
        (b"\x81\xa1a\xd4\xff\x00", "extension of type -1"),
        (msgpack.packb({"a": extension(1, ((2,), "float32"))}), "array 'a' has 2 parts; expected shape, dtype"),
        (msgpack.packb({"a": extension(1, {})}), "in 'a': found msgpack kind 'map', expected 'list'"),
        (msgpack.packb({"a": extension(1, ((-2,), "float32", b""))}), "found msgpack kind 'code 0xfe', expected 'int"),
        (serialization.to_bytes({"a": np.arange(3)}), "array 'a' has dtype 'int64'; accepted: float64, float32, fl"),
        (msgpack.packb({"a": extension(1, ((2,), "object", b"\x80\x04N."))}), "array 'a' has dtype 'object'"),
        (msgpack.packb({"a": extension(1, ((2,), "float32", "12345678"))}), "'string', expected 'byte string'"),
        (msgpack.packb({"a": extension(1, ((3,), "float32", bytes(8)))}), r"of shape \[3\] and dtype float32 has 8"),
        (msgpack.packb({"a": extension(1, ((2,), "float32", bytes(8)), 0)}), "8 bytes, up to byte 27 instead of 28"),
        (b"\x82\xa1a\x80\xa1a\x80", "holds 'a' twice"),
        (serialization.to_bytes({"a": {"kernel": np.ones((2, 2)), "scale": np.ones(2)}}), "tensor 'a.weight' again"),
    ],
)  # fmt: skip
def test_bad_contents(tmp_path, data, message):
    with pytest.raises(InputError, match=message) as error:
        open_flax_msgpack(write(tmp_path, data))
    assert str(error.value).startswith(str(tmp_path / "flax_model.msgpack"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": {}}, r"the chunks of 'w' hold 4 values of dtypes \['float32'\]; expected one dtype and shape \[\]"),
        ({"shape": {"0": 2, "1": 3}}, r"hold 4 values .* shape \[2, 3\]"),
        ({"shape": {"0": 2, "2": 2}}, "needs a map 'shape' of integers"),
        ({"shape": 4}, "needs a map 'shape' of integers"),
        ({"chunks": {"1": np.ones(4, np.float32)}}, "one 'chunks' of arrays"),
        ({"chunks": {"0": {"0": np.ones(4, np.float32)}}}, "one 'chunks' of arrays"),
        ({"chunks": {}}, r"0 values of dtypes \[\]"),
        ({"chunks": {"0": np.ones(2), "1": np.ones(2, np.float16)}}, r"4 values of dtypes \['float16', 'float64'\]"),
    ],
)
def test_bad_chunks(tmp_path, change, message):
    chunks = {"0": np.ones(2, np.float32), "1": np.ones(2, np.float32)}
    array = {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": chunks}
    assert open_flax_msgpack(write(tmp_path, {"w": array})).shapes == {"w": (4,)}
    with pytest.raises(InputError, match=message):
        open_flax_msgpack(write(tmp_path, {"w": array | change}))


def test_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"holds no flax_model\.msgpack and no flax_model\.msgpack\.index\.json"):
        open_flax_msgpack(tmp_path)
    (tmp_path / "flax_model.msgpack").mkdir()
    with pytest.raises(InputError, match=r"cannot read: .*Is a directory"):
        open_flax_msgpack(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.msgpack"}, "names '../outside.msgpack', which is outside the folder"),
        ({"a": "x/../../outside.msgpack"}, "which is outside the folder"),
        ({"a": "x\\outside.msgpack"}, "which is outside the folder"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd', which is outside the folder"),
        ({"a": "none.msgpack"}, "names 'none.msgpack', which is not a file in the folder"),
        ({"a": None}, "names 'None', which is not a file"),
        ({"a": "."}, "names '.', which is not a file"),
        ({}, "key 'weight_map' is missing or empty"),
        ("a.msgpack", "key 'weight_map' is missing or empty"),
        ({"a": "a.msgpack", "b/kernel": "a.msgpack"}, "names tensor 'b/kernel', which none of its files holds"),
        ({"a": "a.msgpack", "b": "a.msgpack", "c": "a.msgpack"}, "names tensor 'b' and 1 more, which none"),
    ],
)
def test_bad_index(tmp_path, weight_map, message):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path, {"a": np.ones(2)}, "outside.msgpack")
    write_shards(folder, {"a.msgpack": {"a": np.ones(2)}}, weight_map)
    with pytest.raises(InputError, match=message) as error:
        open_flax_msgpack(folder)
    assert str(error.value).startswith(str(folder / "flax_model.msgpack.index.json"))


def test_tensor_in_two_shards(tmp_path):
    write_shards(tmp_path, {"a.msgpack": {"x": np.ones(2), "y": np.ones(2)}, "b.msgpack": {"x": np.ones(2)}})
    with pytest.raises(InputError, match=r"b\.msgpack: holds tensor 'x' again, which is in .*a\.msgpack"):
        open_flax_msgpack(tmp_path)


def test_cut_shard_is_named(tmp_path):
    shutil.copytree(GOLDEN / "llama_sharded", tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "flax_model-00002-of-00003.msgpack"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"flax_model-00002-of-00003\.msgpack: the file is cut short: 'model/layers/"):
        open_flax_msgpack(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux reports it")
@pytest.mark.parametrize("chunked", [False, True])
def test_memory_is_that_of_one_tensor(tmp_path, chunked):
    tensors, values = 8, 25 * 2**18  # 25 MiB each, of 200
    part = struct.pack(">I", values * 4)
    with open(tmp_path / "flax_model.msgpack", "wb") as file:
        file.write(bytes([0x80 + tensors]))
        for i in range(tensors):
            head = b"\x93" + msgpack.packb([values]) + msgpack.packb("float32") + b"\xc6" + part
            name = msgpack.packb(f"w{i}")
            if chunked:
                name += b"\x83" + msgpack.packb("__msgpack_chunked_array__") + b"\xc3" + msgpack.packb("shape")
                name += msgpack.packb({"0": values}) + msgpack.packb("chunks") + b"\x81" + msgpack.packb("0")
            file.write(name + b"\xc9" + struct.pack(">I", len(head) + values * 4) + b"\x01" + head)
            file.write(np.full(values, i, np.float32))
    program = """
import pathlib, sys
from rapidfire_jax.models.flax_msgpack import open_flax_msgpack

def peak():
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

before = peak()
found = open_flax_msgpack(pathlib.Path(sys.argv[1]))
opened = peak()
for name in found.shapes:
    assert found.read(name)[-1] == int(name[1:])
print(opened - before, peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    opened, read = map(float, run.stdout.split())
    assert opened < 2
    assert 20 < read < 30

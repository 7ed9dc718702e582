import itertools
import struct

import gguf
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from rapidfire_jax.errors import InputError
from rapidfire_jax.models import gguf_blocks
from rapidfire_jax.models.gguf import read_gguf
from rapidfire_jax.models.gguf_blocks import BLOCKS, decode
from tests.helpers.gguf_files import write_gguf

METADATA = [
    ("add_uint8", "a.u8", 200),
    ("add_int8", "a.i8", -100),
    ("add_uint16", "a.u16", 60000),
    ("add_int16", "a.i16", -30000),
    ("add_uint32", "a.u32", 4_000_000_000),
    ("add_int32", "a.i32", -2_000_000_000),
    ("add_uint64", "a.u64", 2**63 + 1),
    ("add_int64", "a.i64", -(2**62)),
    ("add_float32", "a.f32", 0.25),
    ("add_float64", "a.f64", 0.1),
    ("add_bool", "a.yes", True),
    ("add_bool", "a.no", False),
    ("add_string", "a.text", "naïve 🙂"),
    ("add_array", "a.words", ["one", "", "三"]),
    ("add_array", "a.numbers", [1, -2, 3]),
    ("add_array", "a.floats", [0.5, 1.5]),
    ("add_array", "a.flags", [True, False]),
]


def small(path):
    return write_gguf(path, metadata=METADATA, tensors=[("w", np.arange(32, dtype=np.float32).reshape(4, 8))])


def test_metadata_of_every_type(tmp_path):
    path = small(tmp_path / "m.gguf")
    metadata = read_gguf(path).metadata
    for _, key, value in METADATA:
        assert (metadata[key], type(metadata[key])) == (value, type(value)), key
    reference = gguf.GGUFReader(path).fields
    assert {k: f.contents() for k, f in reference.items() if not k.startswith("GGUF.")} == metadata


def test_version_two_reads_like_three(tmp_path):
    path = small(tmp_path / "m.gguf")
    three = read_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 2) + path.read_bytes()[8:])
    two = read_gguf(path)
    assert (two.metadata, two.tensors) == (three.metadata, three.tensors)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_dequantize_is_bit_equal_to_the_gguf_package(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    stored = gguf.quants.quantize(values, kind)
    tensors = [("before", np.ones(3, np.float32)), ("w", stored, kind), ("cube", stored.reshape(2, 3, -1), kind)]
    file = read_gguf(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    expected = gguf.quants.dequantize(stored, kind)
    assert_same_bits(file.dequantize("w"), expected)
    assert_same_bits(file.dequantize("cube"), expected.reshape(2, 3, 96))
    assert (file.tensors["w"].shape, file.dequantize("w").dtype) == ((6, 96), np.float32)


def test_file_of_every_type(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_blocks, "SLICE", 2048)  # several slices, the last one shorter
    stored = {kind: plausible(kind, rows=9, values=512) for kind in BLOCKS}
    tensors = [(kind, rows, gguf.GGMLQuantizationType[kind]) for kind, rows in stored.items()]
    file = read_gguf(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    assert {name: (info.type, info.shape) for name, info in file.tensors.items()} == {k: (k, (9, 512)) for k in BLOCKS}
    for kind, rows in stored.items():
        assert_same_bits(file.dequantize(kind), oracle(rows, kind))


def plausible(kind, rows, values):
    """Random blocks whose scales are finite, as rows in the dtype that GGUFWriter expects."""
    rng = np.random.default_rng(0)
    size, block = BLOCKS[kind]
    if kind in ("F32", "F16"):
        return rng.normal(size=(rows, values)).astype(block)
    raw = rng.integers(0, 256, rows * values // size * block.itemsize, np.uint8).view(block)
    for field in {"scale", "least"} & set(block.names or ()):
        raw[field] = rng.normal(scale=0.01, size=len(raw))
    return raw.view(np.uint8).reshape(rows, -1)


def oracle(rows, kind):
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])


def assert_same_bits(ours, expected):
    np.testing.assert_array_equal(ours, expected)
    assert (np.signbit(ours) == np.signbit(expected))[~np.isnan(expected)].all()  # also of zeros


@pytest.mark.parametrize("kind", BLOCKS)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_bytes_decode_as_the_gguf_package_does(kind, data):
    size, block = BLOCKS[kind]
    count = data.draw(st.integers(1, 3))
    raw = np.frombuffer(data.draw(st.binary(min_size=count * block.itemsize, max_size=count * block.itemsize)), block)
    expected = oracle(raw.view(np.uint8).reshape(count, -1), kind)
    assert_same_bits(decode(raw, kind), expected.reshape(count, size))


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind[0] == "Q"])
def test_edge_values(kind):
    size, block = BLOCKS[kind]
    scales = [0.0, -0.0, 2.0**-24, -1.5, 65504.0, np.inf, np.nan]
    for fill, scale in itertools.product([0, 1, 0x55, 0x80, 0xAA, 0xFF], scales):
        raw = np.full(2 * block.itemsize, fill, np.uint8).view(block)
        for field in {"scale", "least"} & set(block.names):
            raw[field] = scale
        expected = oracle(raw.view(np.uint8).reshape(2, -1), kind)
        assert_same_bits(decode(raw, kind), expected.reshape(2, size))


def test_empty_and_single_values(tmp_path):
    tensors = [("none", np.zeros((0, 8), np.float32)), ("one", np.array([2.5], np.float32))]
    file = read_gguf(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    assert file.dequantize("none").shape == (0, 8)
    np.testing.assert_array_equal(file.dequantize("one"), [2.5])


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    path = small(tmp_path / "m.gguf")
    file = read_gguf(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"m\.gguf: the data of tensor 'w' is cut short since the file was opened"):
        file.dequantize("w")


def test_alignment_of_the_file_is_used(tmp_path):
    metadata = [("add_custom_alignment", 128)]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for method, value in metadata:
        getattr(writer, method)(value)
    for i in range(3):
        writer.add_tensor(f"w{i}", np.full(5, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "m.gguf")
    assert [info.offset % 128 for info in file.tensors.values()] == [0, 0, 0]
    np.testing.assert_array_equal(file.dequantize("w2"), np.full(5, 2, np.float32))


def test_every_truncation_is_reported(tmp_path):
    whole = small(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.gguf: (the file is cut short: .* should end at byte|cannot read)"):
            read_gguf(cut)


def test_truncation_names_what_is_cut(tmp_path):
    path = small(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for length, what in [(len(whole) - 1, "data of tensor 'w'"), (whole.index(b"a.text") + 20, "metadata 'a.text'")]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=what):
            read_gguf(path)


@pytest.mark.parametrize("key", ["a.text", "a.words", "a.numbers"])
def test_lengths_beyond_the_file(tmp_path, key):
    path = small(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + (4 if key == "a.text" else 8)
    data[at : at + 8] = struct.pack("<Q", 2**62)
    path.write_bytes(data)
    with pytest.raises(InputError, match="cut short"):
        read_gguf(path)


def test_wrong_magic_and_versions(tmp_path):
    path = tmp_path / "m.gguf"
    for data, message in [
        (b"PK\x03\x04" + bytes(60), r"not a GGUF file: it starts with b'PK"),
        (
            b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
            "version 1 is not supported; accepted: little-endian, versions 2 and 3",
        ),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 13), "metadata 'k' has unknown value type 13"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\xff"), "key 0 of the metadata is not UTF-8"),
    ]:
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            read_gguf(path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")


def test_unreadable_tensor_types_are_named_together(tmp_path):
    blocks = np.zeros((2, 136), np.uint8)  # 256 values each
    tensors = [("w", np.ones(8, np.float32))]
    tensors += [(f"q{i}", blocks, gguf.GGMLQuantizationType.IQ4_XS) for i in range(3)]
    tensors += [("i", np.arange(8, dtype=np.int32))]
    path = write_gguf(tmp_path / "m.gguf", tensors=tensors)
    with pytest.raises(InputError) as error:
        read_gguf(path)
    assert "tensor 'q0' and 2 more: type IQ4_XS; tensor 'i': type I32" in str(error.value)
    assert str(error.value).endswith(f"accepted types: {', '.join(BLOCKS)}")

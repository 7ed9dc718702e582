import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.auto import FlaxAutoModelForCausalLM
from rapidfire_jax.models.families import to_hugging_face
from rapidfire_jax.models.heads import CausalLM
from rapidfire_jax.models.rope import Rope
from rapidfire_jax.models.weights import parameters
from tests.helpers.devices import on_eight_devices
from tests.helpers.gguf_files import write_model
from tests.helpers.tiny import TINY, padded_batch, tiny_model

load = FlaxAutoModelForCausalLM.from_pretrained


def checkpoint(model: CausalLM) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face Llama checkpoint, spelled out once more by hand."""
    b = model.blocks
    tensors = {"model.embed_tokens.weight": model.embedding[...], "model.norm.weight": model.norm.scale[...]}
    if not model.config.tie_embeddings:
        tensors["lm_head.weight"] = model.lm_head[...]
    for i in range(model.config.num_layers):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = b.attention_norm.scale[...][i]
        tensors[f"{layer}.post_attention_layernorm.weight"] = b.mlp_norm.scale[...][i]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}.self_attn.{name}.weight"] = getattr(b, name).kernel[...][i].T
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"{layer}.mlp.{name}.weight"] = getattr(b, name).kernel[...][i].T
    return {name: np.ascontiguousarray(np.asarray(value)) for name, value in tensors.items()}


def write(folder, model, tensors=None):
    (folder / "config.json").write_text(json.dumps(to_hugging_face(model.config, dtype="float32")))
    save_file(checkpoint(model) if tensors is None else tensors, folder / "model.safetensors")
    return str(folder)


def assert_same(found: CausalLM, expected: CausalLM):
    found_leaves, expected_leaves = parameters(found), parameters(expected)
    assert (found.config, found_leaves.keys()) == (expected.config, expected_leaves.keys())
    for path, leaf in expected_leaves.items():
        np.testing.assert_array_equal(found_leaves[path], leaf, err_msg=path, strict=True)


def distinct_norms(**changes):
    """Scales of the norms are not 1, so that mixing them up shows."""
    model = tiny_model(**changes)
    for i, norm in enumerate((model.norm, model.blocks.attention_norm, model.blocks.mlp_norm)):
        norm.scale[...] = 1 + 0.3 * jax.random.normal(jax.random.key(i), norm.scale.shape)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_safetensors(tmp_path, tied):
    model = distinct_norms(tie_embeddings=tied)
    assert_same(load(write(tmp_path, model)), model)


def test_shards(tmp_path):
    model = distinct_norms()
    tensors = checkpoint(model)
    write(tmp_path, model, {})
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load(str(tmp_path)), model)


def test_buffers_and_copies_of_tied_heads_are_tolerated(tmp_path):
    model = distinct_norms(tie_embeddings=True)
    extra = {
        "lm_head.weight": np.asarray(model.embedding[...]),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    assert_same(load(write(tmp_path, model, checkpoint(model) | extra)), model)


@pytest.mark.parametrize("stored", [np.float16, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes(tmp_path, stored, wanted):
    model = distinct_norms()
    tensors = {name: value.astype(stored) for name, value in checkpoint(model).items()}
    loaded = parameters(load(write(tmp_path, model, tensors), dtype=wanted))
    for path, leaf in parameters(model).items():
        np.testing.assert_array_equal(loaded[path], np.asarray(leaf).astype(stored).astype(wanted), strict=True)


def test_every_key_that_does_not_fit_is_reported_at_once(tmp_path):
    model = tiny_model()
    tensors = checkpoint(model)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((24, 16), np.float32)
    with pytest.raises(InputError) as error:
        load(write(tmp_path, model, tensors))
    assert str(error.value).split("\n  ") == [
        f"{tmp_path}: the weights do not fit the configuration:",
        "missing: model.layers.1.mlp.up_proj.weight",
        "missing: model.norm.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "shape of model.layers.2.self_attn.k_proj.weight: found [24, 16], expected [16, 24]",
    ]


def test_untied_model_without_head(tmp_path):
    tied = tiny_model(tie_embeddings=True)
    with pytest.raises(InputError, match=r"missing: lm_head\.weight"):
        load(write(tmp_path, tiny_model(), checkpoint(tied)))


def test_quantised_tensors_are_refused(tmp_path):
    model = tiny_model()
    tensors = checkpoint(model) | {"model.norm.weight": np.ones(24, np.int8)}
    with pytest.raises(InputError, match=r"model\.norm\.weight: dtype I8 cannot be read; accepted: F64, F32, F16"):
        load(write(tmp_path, model, tensors))


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_truncated_file(tmp_path, keep):
    folder = write(tmp_path, tiny_model())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: not a whole safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, r"names 'gone\.safetensors', which is not a file in the folder"),
        ({"weight_map": {"a": "../model.safetensors"}}, "outside the folder"),
        ({"weight_map": {"a": "/etc/model.safetensors"}}, "outside the folder"),
        ({}, "key 'weight_map' is missing"),
    ],
)
def test_bad_index(tmp_path, index, message):
    write(tmp_path, tiny_model())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        load(str(tmp_path))


def test_pickles_are_refused_with_the_way_to_convert(tmp_path):
    folder = write(tmp_path, tiny_model())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin cannot be read safely\. Convert .*save_pretrained"):
        load(folder)


def test_folder_without_weights_or_configuration(tmp_path):
    with pytest.raises(InputError, match=r"holds neither config\.json nor a \.gguf file"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(to_hugging_face(TINY, dtype="float32")))
    with pytest.raises(InputError, match=r"holds no model\.safetensors, no flax_model\.msgpack, and no index"):
        load(str(tmp_path))


def test_unknown_dtype(tmp_path):
    with pytest.raises(InputError, match="dtype 'int8' is not supported; accepted: float32, bfloat16, float16, auto"):
        load(str(tmp_path), dtype="int8")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_of_more_than_one_tile(tmp_path, stored, dtype):
    model = tiny_model(hidden_size=136, intermediate_size=301)
    tensors = {name: value.astype(jnp.dtype(stored)) for name, value in checkpoint(model).items()}
    found = load(write(tmp_path, model, tensors), dtype=dtype).blocks
    for name, module in (("self_attn.q_proj", found.q_proj), ("mlp.up_proj", found.up_proj)):
        for i in range(model.config.num_layers):
            expected = tensors[f"model.layers.{i}.{name}.weight"].astype(jnp.dtype(dtype)).T
            np.testing.assert_array_equal(module.kernel[...][i], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, bad, dtype):
    model = tiny_model()
    tensors = {name: value.astype(jnp.dtype(dtype)) for name, value in checkpoint(model).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = bad
    with pytest.warns(UserWarning, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinite"):
        load(write(tmp_path, model, tensors))


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_undoes_the_permutation(tmp_path, tied):
    model = distinct_norms(tie_embeddings=tied, rope=Rope(theta=5000.0), norm_eps=0.25)
    write_model(tmp_path / "m.gguf", model)
    assert_same(load(str(tmp_path / "m.gguf")), model)
    assert_same(load(str(tmp_path)), model)


def test_gguf_that_does_not_fit_its_metadata(tmp_path):
    write_model(tmp_path / "m.gguf", tiny_model(), block_count=4, feed_forward_length=48)
    with pytest.raises(InputError) as error:
        load(str(tmp_path))
    message = str(error.value)
    assert "missing: blk.3.attn_q.weight" in message
    assert "shape of blk.0.ffn_up.weight: found [40, 24], expected [48, 24]" in message


def test_loaded_model_differentiates(tmp_path):
    loaded = load(write(tmp_path, tiny_model()))
    tokens, mask = padded_batch([3, 6], 6)
    graphdef, weights = nnx.split(loaded)
    gradient = jax.jit(jax.grad(lambda w: nnx.merge(graphdef, w)(tokens, mask).sum()))(weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_header_length_that_exceeds_the_file(tmp_path):
    folder = write(tmp_path, tiny_model())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load(folder)


def test_the_hand_written_checkpoint_is_complete(tmp_path):
    write(tmp_path, tiny_model())
    assert len(load_file(tmp_path / "model.safetensors")) == 3 + 9 * TINY.num_layers


def test_trunk_without_its_prefix(tmp_path):
    model = distinct_norms(tie_embeddings=True)
    bare = {name.removeprefix("model."): value for name, value in checkpoint(model).items()}
    assert_same(load(write(tmp_path, model, bare)), model)


def test_tied_head_that_differs_is_named(tmp_path):
    model = distinct_norms(tie_embeddings=True)
    tensors = checkpoint(model) | {"lm_head.weight": np.ones((67, 24), np.float32)}
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        assert_same(load(write(tmp_path, model, tensors)), model)


def test_stored_dtypes_are_kept_apart(tmp_path):
    model = distinct_norms()
    tensors = {
        name: value.astype(np.float32 if "norm" in name else jnp.bfloat16) for name, value in checkpoint(model).items()
    }
    loaded = parameters(load(write(tmp_path, model, tensors), dtype="auto"))
    for path, leaf in loaded.items():
        assert leaf.dtype == ("float32" if "norm" in path else "bfloat16"), path


def test_overlapping_shards(tmp_path):
    model = distinct_norms()
    write(tmp_path, model)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    index = {"weight_map": {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"is in a\.safetensors and in b\.safetensors"):
        load(str(tmp_path))


def test_index_names_a_tensor_that_no_shard_holds(tmp_path):
    write(tmp_path, distinct_norms())
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "gone.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names tensors that its files do not hold: gone\.weight"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}, r"bytes 0 to 12 do not hold F32\[2, 2\]"),
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]}, "do not hold"),
        ({"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}, "do not hold"),
        ({"dtype": "F32", "shape": "wide"}, "damaged"),
        ([], "damaged"),
    ],
)
def test_damaged_header(tmp_path, entry, message):
    write(tmp_path, tiny_model())
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(InputError, match=message):
        load(str(tmp_path))


PLACED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rapidfire_jax import FlaxAutoModelForCausalLM
from rapidfire_jax.models.weights import parameters
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
def place(path, shape):
    wide = [axis for axis, size in enumerate(shape) if size % 8 == 0]
    spec = [None] * len(shape)
    if wide:
        spec[wide[-1]] = "fsdp"
    return NamedSharding(mesh, P(*spec))
split = parameters(FlaxAutoModelForCausalLM.from_pretrained(sys.argv[1], placement=place))
whole = parameters(FlaxAutoModelForCausalLM.from_pretrained(sys.argv[1]))
for path, leaf in split.items():
    assert leaf.sharding == place(path, leaf.shape), path
    np.testing.assert_array_equal(leaf, whole[path])
assert split["blocks.up_proj.kernel"].addressable_shards[0].data.shape == (3, 24, 5)
"""


def test_parameters_are_placed_as_they_are_read(tmp_path):
    folder = write(tmp_path, distinct_norms())
    on_eight_devices(PLACED, folder)

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.auto import FlaxAutoModelForCausalLM
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import CausalLM
from rapidfire_jax.models.lora import add_lora, merge_lora
from rapidfire_jax.models.peft import save_adapter
from rapidfire_jax.models.tokenizer import load_tokenizer
from rapidfire_jax.models.weights import parameters
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tiny import padded_batch, tiny_model

forward = nnx.jit(CausalLM.__call__)
load = FlaxAutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    template = [("add_string", "tokenizer.chat_template", "{{ messages }}")]
    path = write_gguf(tmp_path_factory.mktemp("tokenizer") / "t.gguf", tokenizer={}, metadata=template)
    return load_tokenizer(str(path))


def adapted_model():
    model = tiny_model()
    add_lora(model, rank=2, alpha=5.0, targets=("q_proj", "down_proj"), key=jax.random.key(0))
    for linear in (model.blocks.q_proj, model.blocks.down_proj):
        linear.lora_b[...] = jax.random.normal(jax.random.key(1), linear.lora_b.shape)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
def test_round_trip_is_exact(tmp_path, tokenizer, tied, max_shard_bytes):
    model = tiny_model(tie_embeddings=tied)
    save_pretrained(model, tmp_path / "m", tokenizer, max_shard_bytes=max_shard_bytes)
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes < 10**9)
    if max_shard_bytes == 20_000:
        assert all(file.stat().st_size < 20_000 + 4096 for file in files)
    again = load(str(tmp_path / "m"))
    tokens, mask = padded_batch([4, 7], 7)
    assert again.config == model.config
    np.testing.assert_array_equal(forward(again, tokens, mask), forward(model, tokens, mask), strict=True)


def test_index_of_shards(tmp_path, tokenizer):
    save_pretrained(tiny_model(), tmp_path / "m", tokenizer, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    stored = {name: file.name for file in (tmp_path / "m").glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == stored
    size = sum(leaf.nbytes for leaf in parameters(tiny_model()).values())
    assert index["metadata"]["total_size"] == size


def test_bfloat16_stays_bfloat16(tmp_path, tokenizer):
    graphdef, weights = nnx.split(tiny_model())
    model = nnx.merge(graphdef, jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights))
    save_pretrained(model, tmp_path / "m", tokenizer)
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == "bfloat16"
    again = parameters(load(str(tmp_path / "m"), dtype="bfloat16"))
    for path, leaf in parameters(model).items():
        np.testing.assert_array_equal(again[path], leaf, strict=True)


def test_adapters_are_merged_and_the_value_head_stands_beside(tmp_path, tokenizer):
    model = adapted_model()
    model.add_value_head()
    model.value_kernel[...] = jnp.arange(24, dtype=jnp.float32)
    model.value_bias[...] = jnp.float32(3)
    save_pretrained(model, tmp_path / "m", tokenizer)
    again, merged = parameters(load(str(tmp_path / "m"))), parameters(merge_lora(model))
    for path, leaf in merged.items():
        np.testing.assert_array_equal(again[path], leaf)
    head = load_file(tmp_path / "m/value_head.safetensors")
    np.testing.assert_array_equal(head["v_head.summary.weight"], np.arange(24, dtype=np.float32)[None], strict=True)
    np.testing.assert_array_equal(head["v_head.summary.bias"], np.float32([3]), strict=True)


def test_tokenizer_and_generation_settings(tmp_path, tokenizer):
    save_pretrained(tiny_model(), tmp_path / "m", tokenizer)
    special = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    assert json.loads((tmp_path / "m/generation_config.json").read_text()) == special
    assert special.items() <= json.loads((tmp_path / "m/config.json").read_text()).items()
    again = load_tokenizer(str(tmp_path / "m"))
    assert again("hello 12")["input_ids"] == tokenizer("hello 12")["input_ids"]
    assert again.chat_template == "{{ messages }}"
    assert not (tmp_path / "m/value_head.safetensors").exists()


def test_without_a_tokenizer_no_token_is_named(tmp_path):
    save_pretrained(tiny_model(), tmp_path / "m")
    written = json.loads((tmp_path / "m/config.json").read_text())
    assert [written[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [None, None, None]


def test_adapter_in_the_layout_of_peft(tmp_path):
    model = adapted_model()
    save_adapter(model, tmp_path / "a", base_model_name="org/base")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 5.0, "org/base")
    assert config["target_modules"] == ["down_proj", "q_proj"]
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3
    a = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    b = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    assert (a.shape, b.shape) == ((2, 24), (48, 2))
    np.testing.assert_array_equal(a, model.blocks.q_proj.lora_a[...][1].T)
    change = merge_lora(model).blocks.q_proj.kernel[...][1] - model.blocks.q_proj.kernel[...][1]
    np.testing.assert_allclose(2.5 * b @ a, np.asarray(change).T, atol=1e-5)
    assert tensors["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"].shape == (24, 2)


def test_an_earlier_export_is_replaced_whole(tmp_path, tokenizer):
    folder = tmp_path / "deep" / "m"
    save_pretrained(tiny_model(0), folder, tokenizer, max_shard_bytes=20_000)
    save_pretrained(tiny_model(1), folder, tokenizer)
    assert [file.name for file in folder.glob("model*")] == ["model.safetensors"]
    np.testing.assert_array_equal(load(str(folder)).embedding[...], tiny_model(1).embedding[...])
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


def test_a_folder_with_other_files_is_left_alone(tmp_path, tokenizer):
    (tmp_path / "m").mkdir()
    save_pretrained(tiny_model(), tmp_path / "m", tokenizer)  # empty: fine
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(InputError, match="holds other files"):
        save_pretrained(tiny_model(), tmp_path / "mine", tokenizer)
    with pytest.raises(InputError, match="holds other files"):
        save_pretrained(tiny_model(), tmp_path / "mine/thesis.tex", tokenizer)
    assert (tmp_path / "mine/thesis.tex").exists()


def test_a_failed_export_leaves_what_was_there(tmp_path, tokenizer, monkeypatch):
    save_pretrained(tiny_model(0), tmp_path / "m", tokenizer)

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(tiny_model(1), tmp_path / "m", tokenizer)
    np.testing.assert_array_equal(load(str(tmp_path / "m")).embedding[...], tiny_model(0).embedding[...])
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_adapters_on_the_top_layers_only(tmp_path, tokenizer):
    model = tiny_model()
    add_lora(model, rank=2, alpha=4.0, targets=("v_proj",), key=jax.random.key(0), layers=2)
    model.top_blocks.v_proj.lora_b[...] = jax.random.normal(jax.random.key(1), (2, 2, 16))
    save_adapter(model, tmp_path / "a", base_model_name="org/base")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["layers_to_transform"] == [1, 2]
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    a = tensors.pop("base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight")
    np.testing.assert_array_equal(a, model.top_blocks.v_proj.lora_a[...][1].T)
    assert len(tensors) == 3
    save_pretrained(model, tmp_path / "m", tokenizer)
    tokens, mask = padded_batch([4, 7], 7)
    found = forward(load(str(tmp_path / "m")), tokens, mask)
    np.testing.assert_allclose(found, forward(model, tokens, mask), rtol=1e-4, atol=1e-4)

"""Adapters against `peft` on the tiny models of `tests/golden/families` (`tests/golden/adapters/make.py` made them)."""

import functools
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rapidfire_jax import FlaxAutoModelForCausalLM
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.models.lora import add_lora, merge_lora, projections
from rapidfire_jax.models.peft import load_adapter, save_adapter
from rapidfire_jax.models.weights import parameters

ROOT = Path(__file__).parents[2]
FAMILIES = ROOT / "tests/golden/families"
ADAPTERS = ROOT / "tests/golden/adapters"
NAMES = sorted(folder.name for folder in ADAPTERS.iterdir() if folder.is_dir())

ONE_EACH = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3"]
SCORE = "base_model.model.score.weight"
SAME_SETTINGS = ("base_model_name_or_path", "task_type", "use_rslora", "layers_to_transform", "fan_in_fan_out", "bias")
SAME_SETTINGS += ("modules_to_save",)
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12), dtype=np.int32)

forward = jax.jit(lambda model, tokens: model(tokens))


def base_model(name):
    return FlaxAutoModelForCausalLM.from_pretrained(str(FAMILIES / name))


def settings_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def golden_model(name):
    settings = settings_of(ADAPTERS / name)
    model = base_model(Path(settings["base_model_name_or_path"]).name)
    if settings["task_type"] == "SEQ_CLS":
        model = RewardModel.from_causal(model, jax.random.key(7))
    load_adapter(model, str(ADAPTERS / name))
    return model


def own_model(name, targets="all-linear", layers=None, alpha=6.0, **rslora):
    """With adapters of ours whose B is not zero."""
    model = base_model(name)
    add_lora(model, rank=3, alpha=alpha, targets=targets, key=jax.random.key(0, impl="rbg"), layers=layers, **rslora)
    random = np.random.default_rng(0)
    for projection in projections(model, targets):
        b = getattr(model.stacks[-1], projection).lora_b
        b[...] = jnp.asarray(random.normal(0, 0.1, b.shape), jnp.float32)
    return model


def changed(tmp_path, name, tensors=None, **settings):
    """A copy of an adapter with other settings or tensors."""
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings_of(ADAPTERS / name) | settings))
    tensors = load_file(ADAPTERS / name / "adapter_model.safetensors") if tensors is None else tensors
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@functools.cache
def linear_modules(name):
    tensors = load_file(FAMILIES / name / "model.safetensors")
    names = [key.removesuffix(".weight") for key, value in tensors.items() if value.ndim == 2]
    return [name for name in names if re.search(r"\.\d+\.", name)]


def targeted(name, config):
    """The modules that `peft` puts an adapter on, by its rules for a list of targets."""
    layers = config["layers_to_transform"]

    def is_chosen(module):
        by_end = any(module.endswith(f".{target}") for target in config["target_modules"])
        return by_end and (layers is None or int(re.search(r"\.(\d+)\.", module)[1]) in layers)

    return {module for module in linear_modules(name) if module in config["target_modules"] or is_chosen(module)}


def changes(name, folder):
    """Of every adapted weight `[out, in]`, by `peft`'s rules, once its configuration is known to state the ranks."""
    config, tensors = settings_of(folder), load_file(folder / "adapter_model.safetensors")
    found = {}
    for module in targeted(name, config):
        rank, alpha = (
            next((v for key, v in config[f"{kind}_pattern"].items() if re.match(rf"(.*\.)?({key})$", module)), default)
            for kind, default in (("rank", config["r"]), ("alpha", config["lora_alpha"]))
        )
        a, b = (tensors.pop(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
        assert a.shape[0] == b.shape[1] == rank
        found[module] = b @ a * (alpha / (math.sqrt(rank) if config["use_rslora"] else rank))
    assert tensors.keys() == ({SCORE} if config["modules_to_save"] else set())
    return found


@pytest.mark.supports("PEFT adapter")
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_peft(name):
    model = golden_model(name)
    with np.load(ADAPTERS / name / "golden.npz") as golden:
        tokens, expected = golden["tokens"], golden["logits"]
    expected = expected[..., 0] if expected.shape[-1] == 1 else expected
    close(forward(model, tokens), expected, 1e-4)
    close(forward(merge_lora(model), tokens), expected, 1e-4)


@pytest.mark.supports("PEFT adapter")
@pytest.mark.parametrize("name", NAMES)
def test_written_again_as_peft_wrote_it(name, tmp_path):
    old = settings_of(ADAPTERS / name)
    base = Path(old["base_model_name_or_path"]).name
    save_adapter(
        golden_model(name), tmp_path / "a", base_model_name=old["base_model_name_or_path"], rslora=old["use_rslora"]
    )
    new = settings_of(tmp_path / "a")
    assert targeted(base, new) == targeted(base, old)
    for key in SAME_SETTINGS:
        assert new[key] == old[key]
    ours, theirs = changes(base, tmp_path / "a"), changes(base, ADAPTERS / name)
    for module, change in theirs.items():
        np.testing.assert_allclose(ours[module], change, rtol=1e-5, atol=1e-7)
    if name == "llama_patterns":  # one scale and one rank a stack: the layers' own go into B, zeros fill up the rank
        return
    assert (new["r"], new["lora_alpha"]) == (old["r"], old["lora_alpha"])
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "a", ADAPTERS / name))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, strict=True)


@pytest.mark.supports("PEFT adapter")
@pytest.mark.parametrize("name", ONE_EACH)
def test_own_adapters_come_back(name, tmp_path):
    model, again = own_model(name), base_model(name)
    save_adapter(model, tmp_path / "a", base_model_name=name)
    assert changes(name, tmp_path / "a").keys() == set(linear_modules(name))
    load_adapter(again, str(tmp_path / "a"))
    close(forward(merge_lora(again), TOKENS), forward(model, TOKENS), 1e-5)


@pytest.mark.parametrize(
    ("name", "targets", "layers", "ranks"),
    [
        ("llama", ("up_proj", "v_proj"), 1, {"mlp.up_proj": 3, "self_attn.v_proj": 3}),
        ("gpt2", "all-linear", 2, {"attn.c_attn": 9, "attn.c_proj": 3, "mlp.c_fc": 3, "mlp.c_proj": 3}),
        ("gpt2", ("q_proj", "v_proj"), None, {"attn.c_attn": 6}),
        ("gpt2", "down_proj", 1, {"mlp.c_proj": 3}),
        ("gpt_neox", ("k_proj", "o_proj"), None, {"attention.query_key_value": 3, "attention.dense": 3}),
        ("gpt_neox", ("v_proj", "k_proj"), 2, {"attention.query_key_value": 6}),
        ("phi3", ("v_proj", "up_proj"), 1, {"self_attn.qkv_proj": 3, "mlp.gate_up_proj": 3}),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_some_projections_and_layers(name, targets, layers, ranks, rslora, tmp_path):
    """A fused module gets one adapter with those of its parts side by side."""
    model, again = own_model(name, targets, layers, rslora=rslora), base_model(name)
    save_adapter(model, tmp_path / "a", base_model_name=name, rslora=rslora)
    assert settings_of(tmp_path / "a")["use_rslora"] == rslora
    numbers = range(model.config.num_layers)[-(layers or 0) :]
    prefix = re.match(r".*?\.(?=\d)", linear_modules(name)[0])[0]
    assert changes(name, tmp_path / "a").keys() == {f"{prefix}{i}.{module}" for i in numbers for module in ranks}
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    for module, rank in ranks.items():
        assert len(tensors[f"base_model.model.{prefix}{numbers[0]}.{module}.lora_A.weight"]) == rank
    load_adapter(again, str(tmp_path / "a"))
    close(forward(merge_lora(again), TOKENS), forward(merge_lora(model), TOKENS), 1e-5)
    assert np.abs(forward(merge_lora(model), TOKENS) - forward(base_model(name), TOKENS)).max() > 0.01


@pytest.mark.parametrize("split", [1, 2])
def test_stacks_with_ranks_of_their_own(split, tmp_path):
    """Loaded into split layers, a module's rank and scale differ between them; modules then go by full names."""
    model, again = base_model("llama"), base_model("llama")
    model.split_blocks(split)
    load_adapter(model, str(ADAPTERS / "llama_patterns"))
    save_adapter(model, tmp_path / "a", base_model_name="llama")
    ours, theirs = changes("llama", tmp_path / "a"), changes("llama", ADAPTERS / "llama_patterns")
    assert ours.keys() == theirs.keys()
    for module, change in theirs.items():
        np.testing.assert_allclose(ours[module], change, rtol=1e-5, atol=1e-7)
    load_adapter(again, str(tmp_path / "a"))
    close(forward(merge_lora(again), TOKENS), forward(merge_lora(model), TOKENS), 1e-5)


def test_modules_of_different_layers(tmp_path):
    tensors = load_file(ADAPTERS / "llama_qv/adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if not re.search(r"0\.self_attn|2\.self_attn\.v_proj", key)}
    model = base_model("llama")
    load_adapter(model, str(changed(tmp_path, "llama_qv", tensors=kept)))
    save_adapter(model, tmp_path / "a", base_model_name="llama")
    assert {module.split("layers.")[1] for module in changes("llama", tmp_path / "a")} == {
        "1.self_attn.q_proj", "1.self_attn.v_proj", "2.self_attn.q_proj",
    }  # fmt: skip


def test_head_of_a_reward_model(tmp_path):
    stored = load_file(ADAPTERS / "qwen3_reward/adapter_model.safetensors")
    model = golden_model("qwen3_reward")
    np.testing.assert_array_equal(model.score[...], stored[SCORE][0])
    with pytest.raises(InputError, match=f"unexpected: {SCORE}"):
        load_adapter(base_model("qwen3"), str(ADAPTERS / "qwen3_reward"))
    without = changed(tmp_path, "qwen3_reward", {key: stored[key] for key in stored.keys() - {SCORE}})
    load_adapter(model, str(without))
    np.testing.assert_array_equal(model.score[...], stored[SCORE][0])  # stays what it was
    for score, message in ((stored[SCORE] * np.nan, "NaN or infinite values"), (stored[SCORE][:, :5], "unexpected")):
        shutil.rmtree(without)
        with pytest.raises(InputError, match=f"{message}: {SCORE}"):
            load_adapter(model, str(changed(tmp_path, "qwen3_reward", stored | {SCORE: score})))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "default in the names"])
def test_other_ways_to_store_the_same(kind, tmp_path):
    tensors = load_file(ADAPTERS / "llama_qv/adapter_model.safetensors")
    if "names" in kind:
        tensors = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
    else:
        tensors = {key: value.astype(jnp.dtype(kind)) for key, value in tensors.items()}
    model, expected = base_model("llama"), golden_model("llama_qv")
    load_adapter(model, str(changed(tmp_path, "llama_qv", tensors=tensors)))
    leaves, wanted = (parameters(m) for m in (model, expected))
    assert leaves.keys() == wanted.keys()
    for path in filter(lambda path: ".lora_" in path, wanted):
        assert leaves[path].dtype == jnp.float32
        np.testing.assert_allclose(
            leaves[path], wanted[path], rtol={"float16": 1e-3, "bfloat16": 1e-2}.get(kind, 0), atol=1e-7
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type='PREFIX_TUNING'.*accepted: LORA"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens=\[5, 6\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'.*path_initial_model_for_weight"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights='OLoRA'"),
        ({"lora_alpha": None}, "lora_alpha=None; expected a number"),
        ({"lora_alpha": True}, "lora_alpha=True; expected a number"),
        ({"lora_alpha": 0}, "lora_alpha=0; expected a number other than 0"),
        ({"alpha_pattern": {"v_proj": "8"}}, "lora_alpha='8'; expected a number"),
    ],
)
def test_settings_that_are_refused(settings, message, tmp_path):
    folder = changed(tmp_path, "llama_qv", **settings)
    with pytest.raises(InputError, match=f"adapter_config.json: .*{message}"):
        load_adapter(base_model("llama"), str(folder))


@pytest.mark.parametrize("kind", ["gaussian", "eva", "orthogonal", True, False])
def test_a_start_that_leaves_the_base_model_alone_is_fine(kind, tmp_path):
    load_adapter(base_model("llama"), str(changed(tmp_path, "llama_qv", init_lora_weights=kind)))


def test_an_adapter_for_another_model_is_refused_in_one_message():
    model = base_model("qwen3")  # as many layers of the same width, but other heads and no rank that is wrong
    before = parameters(model)
    with pytest.raises(InputError) as error:
        load_adapter(model, str(ADAPTERS / "gemma2_all"))
    message = str(error.value)
    assert "made for 'tests/golden/families/gemma2', does not fit this model" in message
    assert "unexpected: model.layers.3.self_attn.q_proj" in message
    assert parameters(model).keys() == before.keys()
    with pytest.raises(InputError) as error:
        load_adapter(base_model("llama"), str(ADAPTERS / "qwen3_all"))
    assert "shape of model.layers.0.self_attn.q_proj: found [48, 4] x [4, 32], expected [32, r] x [r, 32]" in str(
        error.value
    )


def test_damaged_tensors_are_refused_in_one_message(tmp_path):
    tensors = load_file(ADAPTERS / "llama_qv/adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight".format
    del tensors[name(0, "q_proj", "B")], tensors[name(1, "v_proj", "A")]
    tensors[name(1, "q_proj", "A")][2, 3] = np.nan
    tensors[name(2, "v_proj", "B")][0, 0] = np.inf
    tensors[name(2, "q_proj", "A")] = tensors[name(2, "q_proj", "A")][:3]
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 32), np.float32)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = np.zeros(32, np.float32)
    with pytest.raises(InputError) as error:
        load_adapter(base_model("llama"), str(changed(tmp_path, "llama_qv", tensors=tensors)))
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(lines) == [
        "NaN or infinite values: model.layers.1.self_attn.q_proj",
        "NaN or infinite values: model.layers.2.self_attn.v_proj",
        "incomplete: model.layers.0.self_attn.q_proj",
        "incomplete: model.layers.1.self_attn.v_proj",
        "shape of model.layers.2.self_attn.q_proj: found [32, 4] x [3, 32], expected [32, r] x [r, 32]",
        "unexpected: base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "unexpected: lm_head",
    ]


def test_no_adapter_at_all(tmp_path):
    for folder in (FAMILIES / "llama", tmp_path):
        with pytest.raises(InputError, match=r"not an adapter: it must hold adapter_config\.json and"):
            load_adapter(base_model("llama"), str(folder))
    with pytest.raises(InputError, match="no such folder"):
        load_adapter(base_model("llama"), str(tmp_path / "none"))
    with pytest.raises(InputError, match="holds no adapters"):
        load_adapter(base_model("llama"), str(changed(tmp_path, "llama_qv", tensors={})))
    with pytest.raises(InputError, match="no adapters to save"):
        save_adapter(base_model("llama"), tmp_path / "a", base_model_name="llama")


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("gpt2", "c_attn", "q_proj k_proj v_proj"),
        ("gpt2", "c_proj", "o_proj down_proj"),
        ("gpt2", "mlp.c_proj", "down_proj"),
        ("gpt2", ("c_fc", "v_proj"), "v_proj up_proj"),
        ("gpt_neox", "query_key_value", "q_proj k_proj v_proj"),
        ("gpt_neox", ("dense", "dense_4h_to_h"), "o_proj down_proj"),
        ("phi3", ("qkv_proj", "gate_up_proj"), "q_proj k_proj v_proj gate_proj up_proj"),
        ("phi3", "up_proj", "up_proj"),
        ("llama", "self_attn.q_proj", "q_proj"),
        ("llama", ("v_proj", "q_proj", "q_proj"), "q_proj v_proj"),
        ("gpt2", "all-linear", "q_proj k_proj v_proj o_proj up_proj down_proj"),
    ],
)
def test_targets_by_the_names_of_hugging_face(name, targets, expected):
    assert projections(base_model(name), targets) == tuple(expected.split())


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("gpt2", ("c_attn", "gate_proj", "attn"), r"\['gate_proj', 'attn'\]: .* all-linear or any of q_proj, .*c_attn"),
        ("llama", "proj", r"\['proj'\]: this model has all-linear or any of q_proj, k_proj"),
        ("llama", "", r"\[''\]"),
        ("phi3", (), r"\[\]: .*qkv_proj"),
    ],
)
def test_unknown_targets(name, targets, message):
    with pytest.raises(InputError, match=f"adapter targets {message}"):
        projections(base_model(name), targets)

"""Jobs that start from a reward model or an adapter, and `rapidfire export`."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from rapidfire_jax.cli import app
from rapidfire_jax.config import load_config
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.auto import FlaxAutoModelForCausalLM, FlaxAutoModelForSequenceClassification
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.models.lora import add_lora, merge_lora
from rapidfire_jax.models.peft import save_adapter
from rapidfire_jax.models.tokenizer import load_tokenizer, stop_ids
from rapidfire_jax.training.job import train
from rapidfire_jax.training.online import OnlineJob
from rapidfire_jax.training.run_directory import RunDirectory
from tests.helpers.tiny import tiny_model

TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10)
load = FlaxAutoModelForCausalLM.from_pretrained


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="session")
def parts(assets, tmp_path_factory):
    """A reward model of another size and an adapter for the model of `assets`."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = load_tokenizer(str(assets / "model"))
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    reward_model = RewardModel.from_causal(tiny_model(3, **size), jax.random.key(0))
    save_pretrained(reward_model, folder / "reward", tokenizer)
    adapted = load(str(assets / "model"))
    add_lora(adapted, rank=2, alpha=2.0, targets="all-linear", key=jax.random.key(1), rslora=True)
    adapted.blocks.v_proj.lora_b[...] = jax.random.normal(jax.random.key(2), adapted.blocks.v_proj.lora_b.shape)
    save_adapter(adapted, folder / "adapter", base_model_name="org/base", rslora=True)
    return SimpleNamespace(reward=folder / "reward", adapter=folder / "adapter", adapted=merge_lora(adapted))


def test_separate_critic(job, parts):
    config = load_config(job(critic={"name": str(parts.reward)}))
    ours = OnlineJob(config)
    start = FlaxAutoModelForSequenceClassification.from_pretrained(str(parts.reward))
    critic = ours.policy.merge_critic(ours.state.frozen, ours.state.trainable)
    np.testing.assert_allclose(critic(TOKENS), start(TOKENS), rtol=1e-5, atol=1e-6)
    directory = RunDirectory.create(config)
    train(config, directory)
    trained = FlaxAutoModelForSequenceClassification.from_pretrained(str(directory.final / "critic"))
    assert np.abs(np.asarray(trained(TOKENS) - start(TOKENS))).max() > 1e-3
    assert not (directory.final / "value_head.safetensors").exists()
    records = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert max(r["policy/ratio_first"] for r in records if "policy/ratio_first" in r) <= 1e-5
    result = run("train", job(critic={"name": str(parts.reward)}, rollout={"log_probs": "reuse"}))
    assert result.exit_code == 2
    assert "separate critic" in result.output


def test_policy_with_an_adapter_merged(job, parts):
    ours = OnlineJob(load_config(job(model={"adapter": str(parts.adapter)})))
    model = ours.policy.merge(ours.state.frozen, ours.state.trainable)
    np.testing.assert_allclose(model(TOKENS), parts.adapted(TOKENS), rtol=1e-5, atol=1e-5)


def test_export_of_a_run(job, tmp_path):
    config = load_config(job(training={"iterations": 2, "checkpoint_every": 1}))
    directory = RunDirectory.create(config)
    train(config, directory)
    shutil.rmtree(directory.final)  # as if it had not finished
    result = run("export", directory.path, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "iteration 2" in result.output
    ours = OnlineJob(config)
    for i in range(2):
        ours.iterate(i)
    expected = ours.policy.merge(ours.state.frozen, ours.state.trainable)(TOKENS)
    np.testing.assert_allclose(load(str(tmp_path / "out"))(TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out/adapter/adapter_config.json").is_file()
    shutil.rmtree(directory.checkpoints)
    result = run("export", directory.path, tmp_path / "out")
    assert (result.exit_code, "no checkpoint yet" in result.output) == (2, True)


def test_export_of_models(assets, parts, tmp_path):
    assert run("export", assets / "model", tmp_path / "a", "--adapter", parts.adapter).exit_code == 0
    np.testing.assert_allclose(load(str(tmp_path / "a"))(TOKENS), parts.adapted(TOKENS), rtol=1e-5, atol=1e-5)
    assert run("export", parts.reward, tmp_path / "r", "--dtype", "bfloat16", "--shard-gb", "0.001").exit_code == 0
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    again = FlaxAutoModelForSequenceClassification.from_pretrained(str(tmp_path / "r"), dtype="auto")
    assert again.embedding.dtype == "bfloat16"
    assert load_tokenizer(str(tmp_path / "r"))("hello")["input_ids"]
    for arguments, message in (
        ((tmp_path / "none", tmp_path / "b"), "no such folder"),
        ((assets / "model", assets), "holds other files"),
        ((assets / "model", tmp_path / "b", "--dtype", "int8"), "dtype 'int8' is not supported"),
        ((parts.reward, tmp_path / "b", "--adapter", parts.adapter), "does not fit this model"),
    ):
        result = run("export", *arguments)
        assert (result.exit_code, message in result.output) == (2, True), result.output


def test_vocabulary(job, assets, parts, tmp_path):
    tokenizer = load_tokenizer(str(assets / "model"))
    padded = tiny_model(vocab_size=len(tokenizer) + 5)
    save_pretrained(padded, tmp_path / "padded", tokenizer)
    OnlineJob(load_config(job(model={"name": str(tmp_path / "padded")})))
    save_pretrained(tiny_model(vocab_size=len(tokenizer) - 1), tmp_path / "small", tokenizer)
    message = f"the tokenizer has {len(tokenizer)} tokens, the model {len(tokenizer) - 1} embeddings"
    with pytest.raises(InputError, match=message):
        OnlineJob(load_config(job(model={"name": str(tmp_path / "small")})))
    result = run("generate", tmp_path / "small", "--prompt", "he")
    assert (result.exit_code, message in result.output) == (2, True)


def test_every_token_that_ends_a_response_is_known_and_kept(job, assets, tmp_path):
    shutil.copytree(assets / "model", tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0]}))
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    assert stop_ids(str(tmp_path / "m"), tokenizer) == (0, 7)
    assert run("export", tmp_path / "m", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [0, 7]
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [9999]}))
    result = run("train", job(model={"name": str(tmp_path / "m")}))
    assert (result.exit_code, "eos_token_id=[9999]" in result.output) == (2, True)


def test_generate_with_an_adapter(assets, parts):
    arguments = ("generate", assets / "model", "--prompt", "he we", "--temperature", 0, "--max-new-tokens", 12)
    plain, adapted = run(*arguments), run(*arguments, "--adapter", parts.adapter)
    assert plain.exit_code == adapted.exit_code == 0
    assert plain.output != adapted.output

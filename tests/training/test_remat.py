"""Jobs that choose what to keep by a budget."""

import json

import jax
import numpy as np
import pytest

from rapidfire_jax.config import MemoryConfig, load_config
from rapidfire_jax.errors import InputError
from rapidfire_jax.memory.devices import GIB
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.models.remat import DOTS, FULL, PRODUCTS, keep_names
from rapidfire_jax.models.tokenizer import load_tokenizer
from rapidfire_jax.training.offline import OfflineJob
from rapidfire_jax.training.online import OnlineJob
from rapidfire_jax.training.remat import preset
from tests.helpers.compilations import compilations
from tests.helpers.tiny import tiny_model
from tests.training.test_bad_input import check, run
from tests.training.test_offline_jobs import data, offline  # noqa: F401
from tests.training.test_online_jobs import online  # noqa: F401

AUTO = {"remat": "auto", "budget_gb": 1.0}
ALL = {"layers": None, "targets": "all-linear"}


def test_presets():
    plans = {"none": None, "products": PRODUCTS, "full": FULL, "dots": DOTS, ("up", "key"): keep_names("up", "key")}
    for name, plan in plans.items():
        assert preset(MemoryConfig(remat=name)) == plan


def test_a_plan_is_fitted_shown_recorded_and_followed(online, finish, capsys):  # noqa: F811
    done = finish(online("ppo", adapter=ALL, memory=AUTO))
    fitted, out = done.job.fitted, capsys.readouterr().out
    assert "Kept for the backward pass, of 3 layers" in out and "mlp_hidden" in out and "GiB (predicted" in out
    record = json.loads((done.run.path / "remat.json").read_text())
    assert record == fitted.record()
    assert record["full_remat_bytes"] < record["measured_bytes"] <= record["budget_bytes"] == GIB
    assert done.job.policy.remat.policy == fitted.choices[0].remat != FULL
    assert record["stacks"][0]["layers"] == 3 == sum(group["layers"] for group in record["stacks"][0]["groups"])


def test_what_was_measured_is_what_runs_and_less_fits_less(online):  # noqa: F811
    rich = OnlineJob(load_config(online("ppo", adapter=ALL, memory=AUTO)))
    with compilations() as found:
        rich.iterate(0)
    assert found and not [program for program in found if "jit(learn)" in program]
    most, least = rich.fitted.measured, rich.fitted.full
    budget = (most + least) / 2
    poor = OnlineJob(load_config(online("ppo", adapter=ALL, memory=AUTO | {"budget_gb": budget / GIB})))
    assert least < poor.fitted.measured <= budget
    # Which plan it is depends on speeds that are measured here; of so small a model, what XLA fuses is a tenth or more.
    assert poor.fitted.measured == pytest.approx(poor.fitted.predicted, rel=0.2)
    assert poor.fitted.choices[0].seconds > rich.fitted.choices[0].seconds
    metrics = poor.iterate(0)
    plain = OnlineJob(load_config(online("ppo", adapter=ALL)))
    reference = plain.iterate(0)
    assert metrics["loss/total"] == pytest.approx(reference["loss/total"], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), poor.state.trainable, plain.state.trainable)


@pytest.mark.slow
def test_policy_and_critic_share_a_budget(online, assets, tmp_path):  # noqa: F811
    tokenizer = load_tokenizer(str(assets / "model"))
    critic = RewardModel.from_causal(tiny_model(vocab_size=len(tokenizer), num_layers=2), jax.random.key(0))
    save_pretrained(critic, tmp_path / "critic", tokenizer)
    job = OnlineJob(load_config(online("ppo", adapter=ALL, memory=AUTO, critic={"name": str(tmp_path / "critic")})))
    assert [costs.layers for costs in job.fitted.costs] == [3, 2]
    assert list(job.policy.remat) == [choice.remat for choice in job.fitted.choices]
    assert job.fitted.full < job.fitted.measured <= GIB


@pytest.mark.parametrize(
    ("task", "file"), [pytest.param("dpo", "preferences", marks=pytest.mark.slow), ("reward_model", "labelled")]
)
def test_offline(offline, task, file):  # noqa: F811
    job = OfflineJob(load_config(offline(task, file, adapter=ALL, memory=AUTO)))
    assert job.fitted.full < job.fitted.measured <= GIB
    with compilations() as found:
        job.iterate(0)
    assert not [program for program in found if "jit(step)" in program]


@pytest.mark.slow
def test_training_all_weights_has_one_plan_for_all_layers(offline):  # noqa: F811
    rich = OfflineJob(load_config(offline("sft", "completions", adapter={"type": "none", "layers": None}, memory=AUTO)))
    budget = (rich.fitted.full + rich.fitted.measured) / 2 / GIB
    memory = AUTO | {"budget_gb": budget}
    poor = OfflineJob(
        load_config(offline("sft", "completions", adapter={"type": "none", "layers": None}, memory=memory))
    )
    assert len(poor.fitted.choices[0].remat.groups) == 1
    assert poor.fitted.measured <= budget * GIB


def test_a_stream_has_no_longest_example(offline):  # noqa: F811
    streaming = {"streaming": True, "shuffle_buffer": 8}
    with pytest.raises(InputError, match=r"memory\.remat=auto: a stream"):
        OfflineJob(load_config(offline("reward_model", "labelled", data=streaming, memory=AUTO)))


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"remat": "auto"}, ["memory.budget_gb", "CPU"]),
        ({"remat": "auto", "budget_gb": 1e-6}, ["memory.budget_gb=1e-06", "0.000 GiB", "micro_batches"]),
        ({"remat": "full", "budget_gb": 1.0}, ["budget_gb=1.0", "remat=full"]),
        ({"remat": ["up", "gates"]}, ["memory", "'gates'", "mlp_hidden"]),
        ({"remat": "most"}, ["memory.remat", "'most'"]),
    ],
)
def test_bad_input(online, memory, words):  # noqa: F811
    check(run("train", online("ppo", memory=memory)), *words)

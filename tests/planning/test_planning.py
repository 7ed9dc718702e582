"""A run is planned from its configuration: shapes are those of the real run, programs are compiled for an H100."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from pallas_kernels import hopper
from rapidfire_jax.cli import app
from rapidfire_jax.config import load_config
from rapidfire_jax.errors import InputError
from rapidfire_jax.memory.devices import DEVICES, find_device
from rapidfire_jax.planning.abstract import abstract_run
from rapidfire_jax.planning.architectures import KNOWN, architecture
from rapidfire_jax.planning.costs import flops, largest_buffers
from rapidfire_jax.planning.estimate import estimate
from rapidfire_jax.planning.fit import fit
from rapidfire_jax.rollout.generate import SamplingConfig, generate, loop_trips
from rapidfire_jax.training.models import load_trainee
from tests.helpers.tiny import padded_batch, tiny_model
from tests.test_configs import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
LLAMA = ROOT / "configs" / "ppo" / "llama3_8b_nf4_lora.yaml"


def avals(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.quantize=nf4", "model.quantize_vocabulary=int8"],
        ["adapter.type=none", "optimizer.name=adamw_8bit"],
    ],
)
def test_shapes_are_those_of_the_run(overrides):
    config = load_config(QUICKSTART, overrides)
    planned = abstract_run(config, "float32")
    trainee = load_trainee(config)
    assert avals(planned.state) == avals(trainee.state)
    assert planned.policy == trainee.model


def test_calls_of_a_run():
    calls = abstract_run(load_config(LLAMA), "bfloat16").calls()
    assert list(calls) == ["rollout", "reference", "learn", "reward"]
    state, rollouts, *_ = calls["learn"][1]
    assert rollouts.tokens.shape == (64, 1024)
    codes = sum(x.size for x in jax.tree.leaves(state.frozen) if x.dtype == jnp.uint8 and x.shape[-1] == 32)
    assert 2 * codes == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert calls["reward"][1][1].shape == (8, 1024)


@pytest.mark.parametrize("name", KNOWN)
def test_known_architectures_have_as_many_parameters_as_their_names_say(name):
    config = architecture(name)
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    layer = D * H * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * D * F
    heads = 1 if config.tie_embeddings else 2
    billions = (config.num_layers * layer + heads * config.vocab_size * D) / 1e9
    expected = {"8B": 8.03, "70B": 70.6, "1B": 1.24, "3B": 3.21, "7B": 7.24}
    size = next(size for key, size in expected.items() if f"-{key}" in name or name.endswith(key))
    assert billions == pytest.approx(size, rel=0.005)


def test_flops_of_loops():
    def program(x):
        x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)

    jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 4))).jaxpr
    assert flops(jaxpr, (5,)) == (3 + 5) * 2 * 4**3


def test_largest_buffers_are_outside_of_fusions():
    program = """
%fused_exponential (param_0: f32[256,256]) -> f32[256] {
  %param_0 = f32[256,256]{1,0} parameter(0)
  %exp.0 = f32[256,256]{1,0} exponential(%param_0), metadata={op_name="jit(f)/exp"}
  ROOT %reduce.0 = f32[256]{0} reduce(%exp.0, %zero), dimensions={0}, to_apply=%region_0
}

ENTRY %main (x: bf16[256,256]) -> f32[256] {
  %x = bf16[256,256]{1,0} parameter(0), metadata={op_name="x"}
  %dot.1 = bf16[256,128]{1,0} dot(%x, %x), metadata={op_name="jit(f)/layer/dot_general"}
  ROOT %fusion.1 = f32[256]{0} fusion(%dot.1), kind=kInput, calls=%fused_exponential
}
"""
    assert largest_buffers(program, 2) == [
        (256 * 128 * 2, "bf16[256,128] layer/dot_general"),
        (256 * 4, "f32[256] fusion.1"),
    ]


def test_bad_input():
    with pytest.raises(InputError, match=r"nowhere/model.*known without files: meta-llama/Meta-Llama-3-8B"):
        abstract_run(load_config(QUICKSTART, ["model.name=./nowhere/model"]), "float32")
    with pytest.raises(InputError, match="task sft: only runs that learn from their own rollouts"):
        abstract_run(load_config(ROOT / "configs" / "rlhf" / "sft.yaml"), "float32")


@pytest.mark.parametrize("device", ["h100-80gb", "a100-40gb", "rtx4090"])
def test_estimates(monkeypatch, device):
    monkeypatch.setattr(hopper, "toolchain", lambda: ["no compiler"])
    found = fit(load_config(QUICKSTART, ["model.dtype=bfloat16"]), find_device(device))
    assert found.estimated == (
        ["no compiler"] if device == "h100-80gb" else ["programs can be compiled for h100-80gb and h200"]
    )
    assert found.fits
    for program in found.programs:
        assert program.need.arguments > 250e6 and program.need.temporaries > 1e6
        assert program.flops > 1e9 and program.bytes_accessed > 250e6
        assert program.expected_seconds > program.seconds > 0
    times = {program.name: program.times for program in found.programs}
    assert times == {"rollout": 1, "reference": 0, "learn": 1}  # which shares the layers below the adapters with it
    expected = sum(program.expected_seconds for program in found.programs if program.times)
    assert found.iteration_seconds == pytest.approx(expected)


@pytest.mark.parametrize("enough", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_does_not_fit_is_told_with_what_was_tried(monkeypatch, enough):
    monkeypatch.setattr(hopper, "toolchain", lambda: ["no compiler"])
    config = load_config(QUICKSTART, ["model.dtype=bfloat16"])
    before = fit(config, find_device("h100-80gb")).peak
    small = dataclasses.replace(find_device("h100-80gb"), memory=before - 1 if enough else 1000)
    monkeypatch.setitem(DEVICES, "h100-80gb", small)
    result = CliRunner().invoke(app, ["plan", str(QUICKSTART), "model.dtype=bfloat16", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 3 and not found["fits"]
    assert found["peak_bytes"] == before
    fits = [tried["fits"] for tried in found["tried"]]
    assert fits == [False] * (len(fits) - 1) + [enough]
    assert found["tried"][0]["overrides"] == ["rollout.cache=int8"]
    overrides = found["tried"][-1]["overrides"]
    again = fit(load_config(QUICKSTART, ["model.dtype=bfloat16", *overrides]), small)
    assert (again.peak, again.fits) == (found["tried"][-1]["peak_bytes"], enough)


def test_a_judge_that_is_a_model_lies_in_memory_too():
    entry = {"model": "Ray2333/GRM-llama3-8B-distill", "quantize": "nf4"}
    run = abstract_run(load_config(LLAMA, [f"judge={json.dumps(entry)}"]), "bfloat16")
    assert len(run.rewards) == 2
    assert list(run.calls()) == ["rollout", "reference", "learn", "reward 1", "reward 2"]


def test_arrays_are_held_until_they_are_read_last():
    def program(x):
        a = jnp.exp(x @ x)  # held until b is there: what is fused reads the product itself
        b = a @ x
        return (b + 1.0) @ x

    need = estimate(jax.jit(program).trace(jnp.ones((16, 16))).jaxpr, donated=0)
    one = 16 * 16 * 4
    assert (need.arguments, need.outputs, need.temporaries) == (one, one, one)


def test_a_loop_holds_what_its_body_holds():
    def program(x):
        return jax.lax.scan(lambda c, _: (((c @ c) @ c) @ c, (c @ c).sum()), x, length=3)

    need = estimate(jax.jit(program).trace(jnp.ones((16, 16))).jaxpr, donated=0)
    assert need.outputs == 16 * 16 * 4 + 3 * 4
    assert 16 * 16 * 4 <= need.temporaries <= 3 * 16 * 16 * 4


@pytest.mark.slow
@pytest.mark.skipif(bool(hopper.toolchain()), reason="; ".join(hopper.toolchain()))
def test_command():
    result = CliRunner().invoke(app, ["plan", str(QUICKSTART), "model.quantize=nf4", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["fits"] and set(found["programs"]) == {"rollout", "reference", "learn"}
    assert found["peak_bytes"] == max(p["peak_bytes"] for p in found["programs"].values()) > 100e6
    learn = found["programs"]["learn"]
    assert (
        learn["donated_bytes"] == learn["output_bytes"] - 4 * 20
        or learn["donated_bytes"] > 0.99 * learn["output_bytes"]
    )


@pytest.mark.parametrize(("rows", "lanes"), [(8, 8), (9, 2), (32, 8)])
def test_trips_of_a_rollout_whose_responses_never_end(rows, lanes):
    """By its trips a small decode batch does the work of one of all rows, and a last round that is not full."""
    model = tiny_model()
    tokens, mask = padded_batch([3] * rows, 4)

    def decoding(size):
        config = SamplingConfig(max_new_tokens=6, eos_ids=(), decode_batch_size=size)
        program = partial(generate, config=config)
        jaxpr = jax.make_jaxpr(program)(model, tokens, mask, jax.random.key(0)).jaxpr
        trips = loop_trips(rows, config)
        return flops(jaxpr, trips) - flops(jaxpr, (*trips[:-1], 0))

    whole = decoding(None)
    assert 0 < whole <= decoding(lanes) <= 1.5 * whole

"""Models with weights of 8 or 4 bits: rounded while they are loaded, trained on through adapters, written out again."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import Quantized, dequantize, quantize, unpack
from rapidfire_jax import FlaxAutoModelForCausalLM, SamplingConfig, generate, make_policy
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.auto import open_checkpoint
from rapidfire_jax.models.export import save_pretrained
from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.models.lora import add_lora, merge_lora
from rapidfire_jax.models.quantization import cast, multiply, round_inputs, shape_of
from rapidfire_jax.models.weights import parameters
from tests.helpers.tiny import padded_batch, tiny_model

GOLDEN = Path(__file__).parent.parent / "golden"
BITSANDBYTES = sorted(folder.name for folder in (GOLDEN / "bitsandbytes").iterdir() if folder.is_dir())
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
}  # 4 bits want groups of 64
TOKENS, MASK = padded_batch([5, 9], 9)
FORMATS = ["int8", "int4", "nf4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantization") / "m"
    save_pretrained(tiny_model(**WIDE), path)
    return path


def restored(model):
    """The same model with arrays in place of quantised kernels."""
    graphdef, state = nnx.split(model)
    flat = [
        (path, leaf.replace(jnp.swapaxes(dequantize(leaf.get_value()), -1, -2)))
        if isinstance(leaf.get_value(), Quantized)
        else (path, leaf)
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@pytest.mark.parametrize("format", FORMATS)
def test_matrices_are_rounded_as_they_are_loaded(folder, format):
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize=format)
    plain = parameters(FlaxAutoModelForCausalLM.from_pretrained(str(folder)))
    for path, value in parameters(model).items():
        if not path.endswith(".kernel"):
            assert np.array_equal(value, plain[path])
            continue
        expected = jax.jit(partial(quantize, format=format))(jnp.swapaxes(plain[path], -1, -2))
        assert shape_of(value) == plain[path].shape
        assert value.format == format
        assert np.array_equal(unpack(value), unpack(expected))
        np.testing.assert_allclose(dequantize(value), dequantize(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_forward_pass_and_decoding_are_those_of_the_rounded_weights(folder, format):
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize=format)
    twin = restored(model)
    np.testing.assert_allclose(model(TOKENS, MASK), twin(TOKENS, MASK), atol=2e-5)
    config = SamplingConfig(max_new_tokens=6, eos_ids=(), greedy=True)
    ours, theirs = (generate(m, TOKENS, MASK, jax.random.key(0), config=config) for m in (model, twin))
    assert np.array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.logp_t, theirs.logp_t, atol=2e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layers", [None, 1])
def test_adapters_on_quantised_weights_have_the_gradients_of_the_rounded_ones(folder, format, layers):
    def gradients(model):
        lora = {"rank": 3, "alpha": 6.0, "targets": "all-linear", "layers": layers}
        policy, frozen, trainable = make_policy(model, jax.random.key(1), lora=lora)
        trainable = jax.tree.map(lambda w: w + 0.03, trainable)

        def loss(trainable):
            return policy.apply(frozen, trainable, policy.encode(frozen, TOKENS, MASK), 4, 1.0).logp_t.sum()

        return jax.tree.leaves(jax.grad(loss)(trainable))

    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize=format)
    twin = restored(model)
    for ours, theirs in zip(gradients(model), gradients(twin), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def whole_and_twin(request, tmp_path_factory):
    """A model with every matrix in 8 or 4 bits, and one with arrays of the same values."""
    path = tmp_path_factory.mktemp("tables") / "m"
    save_pretrained(tiny_model(**WIDE, tie_embeddings=request.param), path)
    model = FlaxAutoModelForCausalLM.from_pretrained(str(path), quantize="nf4", quantize_vocabulary="int8")
    twin = FlaxAutoModelForCausalLM.from_pretrained(str(path), quantize="nf4")
    for name in ("embedding",) if request.param else ("embedding", "lm_head"):
        table, exact = getattr(model, name).get_value(), getattr(twin, name).get_value()
        exact = np.asarray(exact)
        scale = np.abs(exact).max(axis=1, keepdims=True) / 127
        assert table.codes.dtype == jnp.int8
        assert np.array_equal(table.codes, np.round(exact / scale))
        getattr(twin, name).set_value(jnp.asarray(np.asarray(table.codes, np.float32) * scale))
    return model, twin


def test_vocabulary_in_8_bits(whole_and_twin):
    model, twin = whole_and_twin
    assert model.weight_dtype == model.compute_dtype == jnp.float32
    np.testing.assert_allclose(model(TOKENS, MASK), twin(TOKENS, MASK), atol=2e-5)
    config = SamplingConfig(max_new_tokens=6, eos_ids=(), greedy=True)
    ours, theirs = (generate(m, TOKENS, MASK, jax.random.key(0), config=config) for m in (model, twin))
    assert np.array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.logp_t, theirs.logp_t, atol=2e-5)


def test_adapters_under_a_vocabulary_in_8_bits(whole_and_twin):
    def gradients(model):
        policy, frozen, trainable = make_policy(
            nnx.clone(model), jax.random.key(1), lora={"rank": 3, "alpha": 6.0, "targets": "all-linear"}
        )
        trainable = jax.tree.map(lambda w: w + 0.03, trainable)

        def loss(trainable):
            out = policy.apply(frozen, trainable, policy.encode(frozen, TOKENS, MASK), 4, 1.0)
            return (out.logp_t + out.entropy_t).sum()

        return jax.tree.leaves(jax.grad(loss)(trainable))

    for ours, theirs in zip(*map(gradients, whole_and_twin), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_export_restores_the_vocabulary(whole_and_twin, tmp_path):
    model, twin = whole_and_twin
    save_pretrained(model, tmp_path / "out")
    written = FlaxAutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    np.testing.assert_allclose(written(TOKENS, MASK), twin(TOKENS, MASK), atol=5e-5)


def test_tables_are_not_multiplied_in_integers(folder):
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize="int8", quantize_vocabulary="int8")
    graphdef, state = nnx.split(model)
    integers = nnx.merge(graphdef, round_inputs(state))
    error = np.abs(np.asarray(integers(TOKENS, MASK)) - model(TOKENS, MASK)).max()
    assert 0 < error < 0.05 * np.abs(model(TOKENS, MASK)).max()


@pytest.mark.parametrize("layers", [None, 1])
def test_export_restores_16_bits_and_merges_adapters(folder, tmp_path, layers):
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize="nf4")
    add_lora(model, rank=2, alpha=4.0, targets=("q_proj", "down_proj"), key=jax.random.key(0), layers=layers)
    model.stacks[-1].q_proj.lora_b[...] += 0.05
    expected = np.asarray(model(TOKENS, MASK))
    save_pretrained(model, tmp_path / "out")
    written = FlaxAutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    np.testing.assert_allclose(written(TOKENS, MASK), expected, atol=5e-5)
    np.testing.assert_allclose(merge_lora(model)(TOKENS, MASK), expected, atol=5e-5)


def test_reward_model_on_a_quantised_trunk(folder):
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize="nf4")
    reward = RewardModel.from_causal(model, jax.random.key(0))
    assert isinstance(reward.blocks.q_proj.kernel.get_value(), Quantized)
    assert np.isfinite(reward(TOKENS, MASK)).all()


def test_gguf_is_quantised_block_by_block():
    path = str(GOLDEN / "families" / "llama" / "model.gguf")
    plain = parameters(FlaxAutoModelForCausalLM.from_pretrained(path))
    model = parameters(FlaxAutoModelForCausalLM.from_pretrained(path, quantize="int8"))
    for name, value in model.items():
        if name.endswith(".kernel"):
            expected = quantize(jnp.swapaxes(plain[name], -1, -2), "int8")
            assert np.array_equal(value.codes, expected.codes)


@pytest.mark.parametrize("case", BITSANDBYTES)
def test_checkpoint_of_bitsandbytes(case):
    folder = GOLDEN / "bitsandbytes" / case
    golden = np.load(folder / "golden.npz")
    checkpoint, _, _ = open_checkpoint(folder)
    stored = checkpoint.read(str(golden["name"]))
    matrix = dequantize(stored) if isinstance(stored, Quantized) else stored
    np.testing.assert_allclose(matrix, golden["matrix"], rtol=0, atol=1e-6)
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder))
    np.testing.assert_allclose(model(jnp.asarray(golden["tokens"], jnp.int32)), golden["logits"], atol=2e-5)
    taken = {isinstance(value, Quantized) for path, value in parameters(model).items() if path.endswith(".kernel")}
    assert taken == {case in ("nf4", "nf4_bf16_storage", "nf4_fused")}


def test_checkpoint_of_bitsandbytes_in_another_format():
    folder = str(GOLDEN / "bitsandbytes" / "fp4")
    exact = FlaxAutoModelForCausalLM.from_pretrained(folder)
    model = FlaxAutoModelForCausalLM.from_pretrained(folder, quantize="int8")
    assert model.blocks.up_proj.kernel.get_value().format == "int8"
    error = np.abs(np.asarray(model(TOKENS, MASK)) - exact(TOKENS, MASK)).max()
    assert 0 < error < 0.05


def test_bytes_of_an_8b_model():
    """Shapes of Llama 3 8B: matrices take 4.13 bits a weight; embedding and head dilute that, less so in int8."""
    shapes = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
    quantised = sum(
        n * jax.eval_shape(lambda w: quantize(w, "nf4"), jax.ShapeDtypeStruct(shape, jnp.bfloat16)).nbytes
        for shape, n in shapes.items()
    )
    bf16 = 2 * sum(n * rows * columns for (rows, columns), n in shapes.items())
    assert 3.86 < bf16 / quantised < 3.87
    matrices, table = 32 * quantised, jax.ShapeDtypeStruct((128256, 4096), jnp.bfloat16)
    exact = 32 * bf16 + 2 * table.size * 2
    assert 2.80 < exact / (matrices + 2 * table.size * 2) < 2.82
    assert 3.44 < exact / (matrices + 2 * jax.eval_shape(lambda w: quantize(w, "int8"), table).nbytes) < 3.46


@pytest.mark.parametrize("int8", [False, True])
def test_a_cache_of_8_bits_decodes_nearly_the_same(int8):
    model = tiny_model(**WIDE)
    _, cache = model.prefill(TOKENS, MASK, 16, int8=int8)
    assert cache.layers[0].keys.dtype == (jnp.int8 if int8 else jnp.float32)
    assert cache.layers[0].keys.shape[2] == 16
    step = model.decode(model.layers(), cache, jnp.array([3, 4]), jnp.ones(2, bool))
    longer = jnp.concatenate([TOKENS, jnp.array([[3], [4]])], axis=1)
    exact = model.hidden(longer, jnp.pad(MASK, ((0, 0), (0, 1)), constant_values=True))[:, -1]
    error = np.abs(np.asarray(step[0]) - exact).max() / np.abs(exact).max()
    assert error < (0.05 if int8 else 1e-5)
    assert (error > 1e-5) == int8
    assert step[1].layers[1].keys.dtype == cache.layers[1].keys.dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_integers(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 5, 64), dtype) * 3
    x = x.at[0, 0].set(0)
    w = quantize(jax.random.normal(jax.random.key(1), (32, 64)), "int8")
    wide, codes, scales = (np.asarray(a, np.float64) for a in (x, w.codes, w.scale))
    unit = np.abs(wide).max(axis=-1, keepdims=True) / 127
    rounded = np.round(wide / np.where(unit == 0, 1, unit))
    found = multiply(x, round_inputs(w))
    assert found.dtype == dtype
    wanted = (rounded @ codes.T) * unit * scales
    rtol = 1e-2 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=rtol, atol=1e-2 * np.abs(wanted).max())
    assert (np.asarray(found, np.float32)[0, 0] == 0).all()


def test_a_rollout_in_integers_is_nearly_that_of_the_rounded_weights(folder):
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize="int8")
    graphdef, state = nnx.split(model)
    integers = nnx.merge(graphdef, round_inputs(state))
    exact = np.asarray(model(TOKENS, MASK))
    error = np.abs(np.asarray(integers(TOKENS, MASK)) - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.05


def test_casting_leaves_codes_and_scales_alone(folder):
    state = nnx.state(FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize="nf4"))
    kept, plain = (tree["blocks"]["q_proj"]["kernel"].get_value() for tree in (cast(state, "bfloat16"), state))
    assert jax.tree.map(lambda x: x.dtype, kept) == jax.tree.map(lambda x: x.dtype, plain)
    assert cast(state, "bfloat16")["embedding"].get_value().dtype == jnp.bfloat16


def broken(tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(GOLDEN / "bitsandbytes" / "nf4", folder)
    change(folder)
    return str(folder)


def set_quantization(value):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": value}))

    return change


def without(part):
    def change(folder):
        from safetensors.numpy import load_file, save_file

        tensors = {name: x for name, x in load_file(folder / "model.safetensors").items() if not name.endswith(part)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_quantization({"quant_method": "gptq", "bits": 4}), "gptq.*accepted: bitsandbytes"),
        (set_quantization({"quant_method": "bitsandbytes", "load_in_8bit": True}), "load_in_8bit.*accepted"),
        (set_quantization(None), "dtype U8 cannot be read"),
        (without("q_proj.weight.absmax"), r"q_proj.weight.absmax holds None numbers; expected 64"),
        (without("0.self_attn.q_proj.weight"), r"q_proj.weight holds None bytes; expected 2048"),
        (without("1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"), "unexpected: .*up_proj.weight.absmax"),
    ],
)
def test_bad_checkpoints_of_bitsandbytes(tmp_path, change, said):
    with pytest.raises(InputError, match=f"(?s){said}"):
        FlaxAutoModelForCausalLM.from_pretrained(broken(tmp_path, change))


def test_bad_settings(folder, tmp_path):
    with pytest.raises(InputError, match=r"quantize 'nf3' is not supported; accepted: int8, int4, nf4"):
        FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize="nf3")
    with pytest.raises(InputError, match=r"quantize_vocabulary 'nf4' is not supported; accepted: int8"):
        FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize_vocabulary="nf4")
    save_pretrained(tiny_model(), tmp_path / "narrow")
    with pytest.raises(InputError, match=r"groups of 64; blocks.*_proj.kernel has [0-9]+ inputs; accepted: int8"):
        FlaxAutoModelForCausalLM.from_pretrained(str(tmp_path / "narrow"), quantize="nf4")
    model = FlaxAutoModelForCausalLM.from_pretrained(str(folder), quantize="int8")
    with pytest.raises(InputError, match=r"quantised weights are frozen; train adapters"):
        make_policy(model, jax.random.key(0), lora=None)

"""The entry to pretrained models, under the names the Flax classes of transformers had."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rapidfire_jax.errors import InputError
from rapidfire_jax.models import flax_msgpack, safetensors
from rapidfire_jax.models.bitsandbytes import BitsAndBytesCheckpoint
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.decoder import Decoder, Precision
from rapidfire_jax.models.families import FAMILIES, Family, from_hugging_face
from rapidfire_jax.models.families.gguf import GGUFCheckpoint, from_gguf, gguf_layout
from rapidfire_jax.models.gguf import read_gguf
from rapidfire_jax.models.heads import CausalLM, RewardModel, ValueHead
from rapidfire_jax.models.lora import merge_lora
from rapidfire_jax.models.peft import load_adapter
from rapidfire_jax.models.precision import hardware_dtype
from rapidfire_jax.models.quantization import Formats, is_quantized
from rapidfire_jax.models.sources import gguf_file, read_json, resolve
from rapidfire_jax.models.weights import Checkpoint, Placement, load

DTYPES = ("float32", "bfloat16", "float16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
VALUE_HEAD = "value_head.safetensors"


class _AutoModel[M: Decoder]:
    """What the two entries share; `kind` is the class of the models they make."""

    kind: type[M]

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: DTypeLike | None = "float32",
        compute_dtype: DTypeLike | None = None,
        output_dtype: DTypeLike = "float32",
        quantize: str | None = None,
        quantize_vocabulary: str | None = None,
        revision: str | None = None,
        placement: Placement | None = None,
    ) -> M:
        """Loads a model.

        Args:
          name: a folder with `config.json` and safetensors or `flax_model.msgpack`, a `.gguf` file or a folder with
            exactly one, `package://DISTRIBUTION/PATH/IN/IT`, or a Hugging Face repository `organisation/name`.
          dtype: of the weights: float32, bfloat16, float16, "auto", as they are stored, or None, in what the hardware
            multiplies best (`hardware_dtype`).
          compute_dtype: of activations and matrix products; None: that of the weights.
          output_dtype: of the logits; rewards are always float32.
          quantize: "int8", "int4" or "nf4": the layers' matrices are rounded to it one by one while they are read;
            norms and biases keep `dtype`. None: as they are stored, which is NF4 in a checkpoint of bitsandbytes.
            Quantised weights are frozen: train adapters.
          quantize_vocabulary: "int8": embedding and head are rounded too; None: they keep `dtype`.
          revision: branch, tag or commit of a repository; `name@revision` says the same. Cache, token and offline mode
            are those of `huggingface_hub` (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE).
          placement: gives the sharding of each parameter by its path and shape.

        Raises:
          InputError: nothing there, an unsupported architecture, or weights that do not fit the configuration.
        """
        dtype = hardware_dtype() if dtype is None else dtype
        parameters = None if dtype == "auto" else _dtype_name("dtype", dtype, (*DTYPES, "auto"))
        compute = None if compute_dtype is None else _dtype_name("compute_dtype", compute_dtype, DTYPES)
        outputs = DTYPES if cls.kind is CausalLM else ("float32",)
        precision = Precision(compute, _dtype_name("output_dtype", output_dtype, outputs))
        path = resolve(name, revision)
        checkpoint, family, config = open_checkpoint(path)
        model = load(
            cls.kind,
            checkpoint,
            family,
            config,
            dtype=parameters,
            precision=precision,
            formats=Formats(quantize, quantize_vocabulary),
            placement=placement,
        )
        if isinstance(model, CausalLM) and path.is_dir() and (path / VALUE_HEAD).exists():
            _load_value_head(model, path / VALUE_HEAD)
        return model


class FlaxAutoModelForCausalLM(_AutoModel[CausalLM]):
    """Makes a `CausalLM` from whatever holds its weights, with its value head if an earlier run saved one beside it."""

    kind = CausalLM


class FlaxAutoModelForSequenceClassification(_AutoModel[RewardModel]):
    """Makes a `RewardModel` from a sequence classifier with one label.

    A language model has no scalar head to load; `RewardModel.from_causal` puts a new one on its trunk.
    """

    kind = RewardModel


def load_language_model(name: str, *, adapter: str | None = None, **precision: Any) -> CausalLM:
    """A language model with the adapter of a `peft` folder merged into it, if one is named; see `from_pretrained`."""
    return _merged(FlaxAutoModelForCausalLM.from_pretrained(name, **precision), adapter)


def load_model(name: str, *, adapter: str | None = None, **precision: Any) -> CausalLM | RewardModel:
    """A language model or a sequence classifier, as the `architectures` of its configuration say."""
    config = resolve(name) / "config.json"
    architectures = read_json(config).get("architectures") if config.is_file() else None
    if str(architectures).endswith("ForSequenceClassification']"):
        return _merged(FlaxAutoModelForSequenceClassification.from_pretrained(name, **precision), adapter)
    return load_language_model(name, adapter=adapter, **precision)


def _merged[M: Decoder](model: M, adapter: str | None) -> M:
    if adapter is None:
        return model
    if is_quantized(nnx.state(model)):
        raise InputError(
            f"adapter {adapter}: cannot be merged into quantised weights; merge it into those of 16 bits first: "
            "rapidfire export MODEL FOLDER --adapter ADAPTER"
        )
    load_adapter(model, adapter)
    return merge_lora(model)


def _dtype_name(key: str, value: DTypeLike, accepted: tuple[str, ...]) -> str:
    name = value if isinstance(value, str) else jnp.dtype(value).name
    if name not in accepted:
        raise InputError(f"{key} {name!r} is not supported; accepted: {', '.join(accepted)}")
    return name


def open_checkpoint(path: Path) -> tuple[Checkpoint, Family, DecoderConfig]:
    """The tensors at `path`, how they are laid out, and the configuration beside them.

    Raises:
      InputError: no model there, a damaged file, a pickle, or an unsupported architecture.
    """
    if (found := gguf_file(path)) is not None:
        file = read_gguf(found)
        config = from_gguf(file)
        return GGUFCheckpoint(file, config), gguf_layout(file, config), config
    config_file = path / "config.json"
    if not config_file.exists():
        raise InputError(f"{path}: not a model: it holds neither config.json nor a .gguf file")
    values = read_json(config_file)
    config = from_hugging_face(values, where=str(config_file))
    if _is_in_4_bits(values, config_file):
        return BitsAndBytesCheckpoint(path), FAMILIES[config.family], config
    if any((path / name).exists() for name in safetensors.FILES):
        return safetensors.open_safetensors(path), FAMILIES[config.family], config
    if any((path / name).exists() for name in flax_msgpack.FILES):
        return flax_msgpack.open_flax_msgpack(path), FAMILIES[config.family], config
    raise InputError(_no_weights(path))


def _is_in_4_bits(values: dict[str, Any], where: Path) -> bool:
    """Whether the weights beside a `config.json` are those of bitsandbytes.

    Raises:
      InputError: they are quantised in another way.
    """
    said = values.get("quantization_config")
    if said is None:
        return False
    if isinstance(said, dict) and said.get("quant_method") == "bitsandbytes" and said.get("load_in_4bit"):
        return True
    raise InputError(f"{where}: quantization_config={said!r:.200}; accepted: bitsandbytes with load_in_4bit, or none")


def _no_weights(folder: Path) -> str:
    message = f"{folder}: holds no model.safetensors, no flax_model.msgpack, and no index of either"
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if not pickles:
        return message
    return (
        f"{message}; {', '.join(pickles)} cannot be read safely. Convert where PyTorch is installed: python -c "
        f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('NEW')\""
    )


def _load_value_head(model: CausalLM, file: Path) -> None:
    stored = safetensors.Safetensors(file, [file])
    kernel, bias = "v_head.summary.weight", "v_head.summary.bias"
    if stored.shapes != {kernel: (1, model.config.hidden_size), bias: (1,)}:
        expected = f"{kernel} [1, {model.config.hidden_size}] and {bias} [1]"
        raise InputError(f"{file}: holds {stored.shapes}; expected {expected}")
    weights = (jnp.asarray(stored.read(name)[0], jnp.float32) for name in (kernel, bias))
    model.add_value_head(ValueHead(*weights))

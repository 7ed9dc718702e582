"""The entry to pretrained models, under the name the Flax classes of transformers had."""

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import from_gguf, from_hugging_face
from rapidfire_jax.models.decoder import CausalLM
from rapidfire_jax.models.gguf import read_gguf
from rapidfire_jax.models.sources import gguf_file, read_json, resolve
from rapidfire_jax.models.weights import GGUF, load_gguf, load_safetensors

DTYPES = ("float32", "bfloat16")


class FlaxAutoModelForCausalLM:
    """Makes a `CausalLM` from whatever holds its weights."""

    @classmethod
    def from_pretrained(cls, name: str, *, dtype: str = "float32") -> CausalLM:
        """Loads a model.

        Args:
          name: a folder with `config.json` and safetensors, a `.gguf` file or a folder with exactly one,
            `package://DISTRIBUTION/PATH/IN/IT`, or a Hugging Face repository `organisation/name[@revision]`.
          dtype: of the weights, "float32" or "bfloat16".

        Raises:
          InputError: nothing there, an unsupported architecture, or weights that do not fit the configuration.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is not supported; accepted: {', '.join(DTYPES)}")
        path = resolve(name)
        if (found := gguf_file(path)) is not None:
            file = read_gguf(found)
            tied = GGUF["lm_head"] not in file.tensors
            return load_gguf(file, from_gguf(file.metadata, tied=tied, where=str(found)), dtype)
        config_file = path / "config.json"
        if not config_file.exists():
            raise InputError(f"{path}: not a model: it holds neither config.json nor a .gguf file")
        return load_safetensors(path, from_hugging_face(read_json(config_file), where=str(config_file)), dtype)

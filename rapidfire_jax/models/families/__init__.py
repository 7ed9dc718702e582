"""The families of models: one entry each, in the order in which messages list them.

A new family is a `Family` in a file here, one line below, and a golden case in the tests.
"""

from collections.abc import Mapping
from typing import Any

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.families import gemma, gpt, llama, phi3
from rapidfire_jax.models.families.base import Family, Keys

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (*llama.FAMILIES, *gemma.FAMILIES, *gpt.FAMILIES, *phi3.FAMILIES)
}


def from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Reads a `config.json`, in the spelling of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
      InputError: an unknown `model_type`, or a value that is missing, of the wrong type, or not supported.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise InputError(f"{where}: model_type {name!r} is not supported; known: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[name].read(Keys(config, where))
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(where) else f"{where}: {message}") from None


def to_hugging_face(config: DecoderConfig, *, dtype: str, scalar_head: bool = False) -> dict[str, Any]:
    """The `config.json` of a checkpoint, readable by transformers 4 and 5.

    Args:
      config: of the model.
      dtype: of the weights in the checkpoint.
      scalar_head: it is a reward model or critic, not a language model.
    """
    family = FAMILIES[config.family]
    values: dict[str, Any] = {"architectures": [family.architectures[scalar_head]], "model_type": family.model_type}
    values |= family.write(config) | {"torch_dtype": dtype}
    if scalar_head:
        values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return values

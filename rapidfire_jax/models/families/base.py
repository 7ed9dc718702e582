"""What a family of models declares, and helpers to read and write its `config.json`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.rope import TYPES, Rope


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`: names of its tensors, and its `config.json` in and out.

    `names` maps our parameters to the stored tensors that hold them, {} being the layer; entries of parameters that a
    model does not have are left out. Several parameters of one stored tensor lie in it one after another along the
    output axis, or head by head if `interleaved`. Stored matrices are `[out, in]` unless `transposed`.
    """

    model_type: str
    architectures: tuple[str, str]  # the class with a language-model head, the one with a scalar head
    names: Mapping[str, str]
    read: Callable[["Keys"], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    trunk: str = "model."  # prefix of the names of everything but the heads
    gguf: str = ""  # `general.architecture`
    interleaved: bool = False
    transposed: bool = False
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # endings of tensors that hold no weights


class Keys:
    """A `config.json` that is asked for values and names the key in every complaint."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; the default where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer."""
        value = self.get(key, default)
        if value is None:
            raise InputError(f"{self.where}: key {key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{self.where}: {key}={value!r}; expected an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.where}: {key}={value!r}; expected a number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key}={value!r}; expected true or false")
        return value

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """A number, or null as written; the default where the key is absent."""
        value = self.values.get(key, default)
        return None if value is None else self.number(key, default)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object, empty where it is absent."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise InputError(f"{self.where}: {key}={value!r}; expected an object")
        return value

    def refuse(self, **accepted: tuple[Any, ...]) -> None:
        """Complains of keys with other values than those accepted, of which the first is the default."""
        for key, values in accepted.items():
            if self.get(key, values[0]) not in values:
                raise InputError(f"{self.where}: {key}={self.values[key]!r} is not supported; accepted: {list(values)}")


def sizes(keys: Keys, *, tied: bool, head_dim: int | None = None) -> dict[str, Any]:
    """The sizes that most families spell alike; `tied` and `head_dim` are the family's defaults."""
    heads, width = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    return {
        "vocab_size": keys.integer("vocab_size"),
        "hidden_size": width,
        "intermediate_size": keys.integer("intermediate_size"),
        "num_layers": keys.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": keys.integer("num_key_value_heads", heads),
        "head_dim": keys.integer("head_dim", head_dim or width // max(heads, 1)),
        "max_positions": keys.integer("max_position_embeddings", 2048),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.flag("tie_word_embeddings", tied),
    }


def write_sizes(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `sizes` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_rope(
    keys: Keys,
    *,
    theta: str = "rope_theta",
    default_theta: float = 10000.0,
    fraction: str = "partial_rotary_factor",
    default_fraction: float = 1.0,
) -> Rope:
    """Rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    inner = keys.mapping("rope_parameters") or keys.mapping("rope_scaling")
    return rope_of(
        Keys(inner, keys.where),
        theta=keys.number(theta, default_theta),
        fraction=keys.number(fraction, default_fraction),
        context=keys.integer("max_position_embeddings", 2048),
        original=keys.get("original_max_position_embeddings"),
    )


def rope_of(keys: Keys, *, theta: float, fraction: float, context: int, original: int | None = None) -> Rope:
    """Rotary embedding from one set of rope parameters; `theta` and `fraction` are used where it has none.

    Args:
      context: the model's `max_position_embeddings`.
      original: `original_max_position_embeddings` where it stands beside the parameters.
    """
    kind = keys.get("rope_type", keys.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in TYPES:
        raise InputError(f"{keys.where}: rope type {kind!r} is not supported; known: {', '.join(TYPES)}")
    rope = Rope(theta=keys.number("rope_theta", theta), fraction=keys.number("partial_rotary_factor", fraction))
    if kind == "default":
        return rope
    if kind == "dynamic":
        original = context
    elif original is None:
        original = keys.integer("original_max_position_embeddings", context)
    fields: dict[str, Any] = {"type": kind, "original_positions": None if kind == "linear" else original}
    if kind == "longrope":
        for name in ("short", "long"):
            fields[f"{name}_factors"] = _factors(keys, f"{name}_factor")
        ratio = keys.number("factor", context / original)
        default = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return dataclasses.replace(rope, **fields, attention_factor=keys.number("attention_factor", default))
    fields["factor"] = keys.number("factor", context / original if kind == "yarn" else None)
    if kind == "llama3":
        fields |= {name: keys.number(name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= {
            "beta_fast": keys.number("beta_fast", 32.0),
            "beta_slow": keys.number("beta_slow", 1.0),
            "truncate": keys.flag("truncate", True),
            "attention_factor": keys.number("attention_factor", _yarn_attention(keys, fields["factor"])),
        }
    return dataclasses.replace(rope, **fields)


def write_rope(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` that `rope_of` and transformers read."""
    values: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        values["partial_rotary_factor"] = rope.fraction
    if rope.type not in ("default", "longrope"):
        values["factor"] = rope.factor
    if rope.type in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = rope.original_positions
    if rope.type == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.type == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.type == "longrope":
        values |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.type in ("yarn", "longrope"):
        values["attention_factor"] = rope.attention_factor
    return values


def write_both_ropes(rope: Rope) -> dict[str, Any]:
    """The spelling of transformers 5 and, beside it, the one of transformers 4."""
    new = write_rope(rope)
    old = {key: value for key, value in new.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return {
        "rope_parameters": new,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.type == "default" else old,
    }


def _factors(keys: Keys, name: str) -> tuple[float, ...]:
    values = keys.get(name)
    if not isinstance(values, list) or not all(isinstance(v, int | float) and v > 0 for v in values):
        raise InputError(f"{keys.where}: {name}={values!r}; expected a list of positive numbers")
    return tuple(map(float, values))


def _yarn_attention(keys: Keys, factor: float) -> float:
    """Peng et al. 2023, equation 22; with `mscale` as DeepSeek writes it."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = keys.get("mscale"), keys.get("mscale_all_dim")
    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1.0)

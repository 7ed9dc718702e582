"""YAML and command-line overrides -> one frozen, validated run configuration."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import Field

from rapidfire_jax.config.data import DataConfig
from rapidfire_jax.config.reward import RewardConfig
from rapidfire_jax.config.section import DType, Fraction, NonNegative, Positive, Section
from rapidfire_jax.errors import InputError


class WeightsConfig(Section):
    """Which weights a model starts from, and in what it computes."""

    name: Annotated[str, Field(min_length=1, description="folder, .gguf file, hub repository, or package://DIST/FILE")]
    dtype: DType = "float32"
    compute_dtype: DType | None = Field(default=None, description="of activations and products; null: the weights'")


class ModelConfig(WeightsConfig):
    """The policy."""

    adapter: str | None = Field(default=None, description="peft folder or repository, merged into the weights")


class AdapterConfig(Section):
    """What is trained: low-rank adapters (Hu et al. 2021) or every weight."""

    type: Literal["lora", "none"] = "lora"
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    layers: Positive | None = Field(default=None, description="adapt only the last n layers; null: all")
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023)")


class RolloutConfig(Section):
    """How responses are sampled."""

    batch_size: Positive = 64
    max_new_tokens: Positive = 64
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    top_k: Annotated[int, Field(ge=0, description="0: off")] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    dtype: Literal["float32", "bfloat16"] | None = Field(default=None, description="of decoding; null: the model's")
    log_probs: Literal["reuse", "recompute"] = Field(
        default="recompute",
        description="behaviour log-probabilities and values: from the decode, or from a pass of the update's own",
    )


class RLConfig(Section):
    """Proximal policy optimisation."""

    kl_coef: NonNegative = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    clip_range: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    value_clip_range: Annotated[float, Field(gt=0.0)] = 0.2
    value_coef: NonNegative = 0.1
    entropy_coef: NonNegative = 0.0
    whiten_advantages: bool = True
    reward_clip: Annotated[float, Field(gt=0.0)] | None = None
    missing_eos_penalty: NonNegative = 0.0
    epochs: Positive = 4
    minibatches: Positive = 1


class OptimizerConfig(Section):
    """Optimiser and learning-rate schedule; the schedule counts iterations."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: NonNegative = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0


class TrainingConfig(Section):
    """Length of the run, checkpoints and evaluation."""

    iterations: Positive = 100
    checkpoint_every: Positive = 50
    keep_checkpoints: Positive = 2
    eval_prompts: Positive = 128
    eval_every: Positive | None = Field(default=None, description="null: before and after only")


class MemoryConfig(Section):
    """What is kept for the backward pass."""

    remat: Literal["none", "full"] = "none"


class LoggingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True


class RunConfig(Section):
    """One complete run."""

    task: Literal["ppo"]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    run_dir: Annotated[str, Field(min_length=1)]
    model: ModelConfig
    critic: WeightsConfig | None = Field(
        default=None, description="a sequence classifier with one label; null: a value head on the policy"
    )
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    reward: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    rollout: RolloutConfig = RolloutConfig()
    rl: RLConfig = RLConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    memory: MemoryConfig = MemoryConfig()
    logging: LoggingConfig = LoggingConfig()

    @pydantic.field_validator("reward", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, dict) else value

    @pydantic.model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.rollout.batch_size % self.rl.minibatches:
            raise ValueError(
                f"rollout.batch_size={self.rollout.batch_size} is not a multiple of "
                f"rl.minibatches={self.rl.minibatches}"
            )
        if self.critic is not None and self.rollout.log_probs == "reuse":
            raise ValueError(
                "rollout.log_probs=reuse takes values from the decode, which a separate critic has no part in; "
                "use recompute"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file, applies `section.key=value` overrides (values are YAML too) and validates the whole.

    Raises:
      InputError: naming the file, the key, the value found and what would be accepted.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections such as `model:` and `rl:`, found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, where=str(path))


def parse_config(tree: dict[str, Any], where: str = "configuration") -> RunConfig:
    """Validates an already parsed tree; see `load_config`."""
    try:
        return RunConfig.model_validate(_numbers(tree))
    except pydantic.ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise InputError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"override {override!r}: write section.key=value, for example rl.kl_coef=0.02")
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise InputError(f"override {override!r}: {section!r} is not a section")
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not YAML: {error}") from None


def _numbers(value: Any, key: str = "") -> Any:
    """What YAML 1.1 cannot say: `1e-4` is a number, and a list where a tuple is wanted is fine."""
    if isinstance(value, dict):
        return {k: v if k == "args" else _numbers(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_numbers(v) for v in value)
    if isinstance(value, str):
        try:
            return float(value) if value[:1] in "+-.0123456789" and "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _fields(location: tuple[int | str, ...]) -> list[str]:
    """Names accepted beside the last part of `location`."""
    model: Any = RunConfig
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation if isinstance(part, str) else None
        sections = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
        model = sections[0] if sections else (RewardConfig if part == "reward" else model)
    return list(model.model_fields)


def _explain(error: Any) -> str:
    location = tuple(error["loc"])
    key = ".".join(str(part) for part in location) or "configuration"
    if error["type"] == "extra_forbidden":
        names = _fields(location)
        nearest = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(names)}"
        return f"unknown key {key!r}; {hint}"
    if error["type"] == "missing":
        return f"key {key!r} is required"
    message = error["msg"].removeprefix("Value error, ")
    found = "" if error["type"] == "value_error" else f"; found {error['input']!r}"
    return f"{key}: {message}{found}"

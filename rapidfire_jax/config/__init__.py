"""YAML and command-line overrides -> one frozen, validated run configuration.

A run has the sections that all runs share, those of its kind (online: it learns from its own rollouts; offline: from
data), and one of its algorithm, which is derived from the dataclasses of `rapidfire_jax.algorithms`.
"""

import difflib
import functools
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import Field

from rapidfire_jax.algorithms import tasks
from rapidfire_jax.config.data import DataConfig
from rapidfire_jax.config.reward import RewardConfig
from rapidfire_jax.config.section import DType, Fraction, NonNegative, Positive, Quantize, Section, section_of
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.remat import Group

FROZEN = "quantised weights are frozen; use adapter.type=lora"


class WeightsConfig(Section):
    """Which weights a model starts from, and in what it computes."""

    name: Annotated[str, Field(min_length=1, description="folder, .gguf file, hub repository, or package://DIST/FILE")]
    dtype: DType | None = Field(default=None, description="of the weights; null: the hardware's, see `with_dtypes`")
    compute_dtype: DType | None = Field(default=None, description="of activations and products; null: the weights'")
    quantize: Quantize | None = Field(default=None, description="of the layers' matrices, frozen; null: as stored")
    quantize_vocabulary: Literal["int8"] | None = Field(default=None, description="of embedding and head; null: dtype")


class ModelConfig(WeightsConfig):
    """The model that is trained."""

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

    batch_size: Positive = Field(default=64, description="responses an iteration")
    max_new_tokens: Positive = 64
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    top_k: Annotated[int, Field(ge=0, description="0: off")] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Field(ge=0.0, le=1.0, description="of the most likely token's probability")] = 0.0
    decode_batch_size: Positive | None = Field(
        default=None, description="responses decoded at a time, refilled as they end; null: all"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(default=None, description="of decoding; null: the model's")
    cache: Literal["int8"] | None = Field(default=None, description="of keys and values; null: dtype of decoding")
    activations: Literal["int8"] | None = Field(
        default=None, description="rounded token by token before they meet int8 weights; null: dtype of decoding"
    )
    log_probs: Literal["reuse", "recompute"] = Field(
        default="recompute",
        description="behaviour log-probabilities and values: from the decode, or from a pass of the update's own",
    )


class OptimizerConfig(Section):
    """Optimiser and learning-rate schedule; the schedule counts iterations."""

    name: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    learning_rate: NonNegative = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    stochastic_rounding: bool | None = Field(
        default=None, description="of bfloat16 weights, by adamw_8bit; null: yes, where there are any"
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.stochastic_rounding is not None and self.name != "adamw_8bit":
            raise ValueError(
                f"stochastic_rounding={str(self.stochastic_rounding).lower()}: {self.name} rounds to nearest; "
                "accepted: null, or name=adamw_8bit"
            )
        return self


class CriticConfig(Section):
    """The critic: a value head on the policy's trunk, or a model of its own."""

    name: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="a sequence classifier with one label, as model.name; null: a head on the policy"
    )
    dtype: DType | None = None
    compute_dtype: DType | None = None
    quantize: Quantize | None = None
    quantize_vocabulary: Literal["int8"] | None = None
    optimizer: OptimizerConfig | None = Field(default=None, description="of its own; null: shared with the policy")


class TrainingConfig(Section):
    """Length of the run, checkpoints and evaluation."""

    iterations: Positive | None = None
    checkpoint_every: Positive = 50
    keep_checkpoints: Positive = 2
    eval_every: Positive | None = Field(default=None, description="null: before and after only")


class OnlineTrainingConfig(TrainingConfig):
    """An iteration is a rollout and what is learnt from it."""

    iterations: Positive = 100
    eval_prompts: Positive = 128


class OfflineTrainingConfig(TrainingConfig):
    """An iteration is an optimiser step."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(default=None, description="passes over the data")
    eval_examples: Positive = 256

    @pydantic.model_validator(mode="after")
    def _check(self) -> "OfflineTrainingConfig":
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError(f"give iterations or epochs; found iterations={self.iterations} and epochs={self.epochs}")
        return self


class MemoryConfig(Section):
    """What is kept for the backward pass, and what is computed again instead."""

    remat: Literal["auto", "none", "products", "dots", "full"] | tuple[str, ...] = Field(
        default="products",
        description="auto: what loses least time within the budget; none: all is kept; products: all but norms, "
        "attention scores and what an MLP makes of its products; dots: results of products with weights; full: inputs "
        "of layers only; or names of activations",
    )
    budget_gb: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="GiB for temporaries of learning, for remat=auto; null: what the device has left"
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "MemoryConfig":
        if self.budget_gb is not None and self.remat != "auto":
            raise ValueError(f"budget_gb={self.budget_gb} has no effect with remat={self.remat}; use remat=auto")
        if not isinstance(self.remat, str):
            Group(keep=self.remat)
        return self


class LoggingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True


class RunConfig(Section):
    """One complete run; `run_class` adds the section of its algorithm."""

    task: str
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    run_dir: Annotated[str, Field(min_length=1)]
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    memory: MemoryConfig = MemoryConfig()
    logging: LoggingConfig = LoggingConfig()

    @pydantic.model_validator(mode="after")
    def _check_trained(self) -> "RunConfig":
        critic = getattr(self, "critic", None)
        for name, section in (("model", self.model), ("critic", critic)):
            for key in ("quantize", "quantize_vocabulary") if self.adapter.type == "none" and section else ():
                if format := getattr(section, key):
                    raise ValueError(f"{name}.{key}={format}: {FROZEN}")
        if (self.model.quantize or self.model.quantize_vocabulary) and self.model.adapter:
            raise ValueError(
                "model.adapter cannot be merged into quantised weights; merge it first: rapidfire export MODEL FOLDER "
                "--adapter ADAPTER"
            )
        for key, section in (("model", self.model), ("critic", critic)):
            if self.adapter.type == "none" and section is not None and section.dtype == "float16":
                raise ValueError(
                    f"{key}.dtype=float16 with adapter.type=none: weights in float16 lose most of what they learn; "
                    f"use {key}.dtype=float32 with {key}.compute_dtype=float16, or adapter.type=lora"
                )
        return self

    @property
    def settings(self) -> Any:
        """The section of the algorithm."""
        return getattr(self, tasks()[self.task].section)


class OnlineRunConfig(RunConfig):
    """A run that learns from its own rollouts."""

    critic: CriticConfig = CriticConfig()
    reward: tuple[RewardConfig, ...]
    judge: tuple[RewardConfig, ...] = Field(
        default=(), description="scores responses to the held-out prompts; nothing is trained on it"
    )
    rollout: RolloutConfig = RolloutConfig()
    training: OnlineTrainingConfig = OnlineTrainingConfig()

    @pydantic.field_validator("reward", "judge", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, dict) else value

    @pydantic.model_validator(mode="after")
    def _check(self) -> "OnlineRunConfig":
        algorithm, rows, settings = tasks()[self.task], self.rollout.batch_size, self.settings
        if not self.reward:
            raise ValueError("reward: give at least one")
        for name, parts in (("minibatches", settings.minibatches), ("group_size", getattr(settings, "group_size", 1))):
            if rows % parts:
                raise ValueError(f"rollout.batch_size={rows} is not a multiple of rl.{name}={parts}")
        if rows // settings.minibatches % settings.micro_batches:
            raise ValueError(
                f"{rows // settings.minibatches} responses a minibatch are not a multiple of "
                f"rl.micro_batches={settings.micro_batches}"
            )
        if self.rollout.activations and self.model.quantize != "int8":
            raise ValueError(f"rollout.activations=int8 needs model.quantize=int8; found {self.model.quantize}")
        if not algorithm.has_critic and self.critic != CriticConfig():
            raise ValueError(f"critic: {self.task} has none")
        if self.rollout.log_probs == "reuse":
            needing = {
                "a separate critic": self.critic.name,
                "rl.importance_cap": settings.importance_cap,
                "rl.bootstrap_truncated": getattr(settings, "bootstrap_truncated", False),
            }
            for what, value in needing.items():
                if value:
                    raise ValueError(
                        "rollout.log_probs=reuse takes log-probabilities and values from the decode, which has none "
                        f"for {what}; use recompute"
                    )
        from rapidfire_jax.algorithms import packing

        if (problem := packing.objection(settings)) is not None:
            raise ValueError(f"rl.{problem}")
        if (problem := algorithm.objection(self)) is not None:
            raise ValueError(problem)
        return self


class OfflineRunConfig(RunConfig):
    """A run that learns from data that exist already."""

    training: OfflineTrainingConfig

    @pydantic.model_validator(mode="after")
    def _check(self) -> "OfflineRunConfig":
        settings = self.settings
        if settings.batch_size % settings.micro_batches:
            section = tasks()[self.task].section
            raise ValueError(
                f"{section}.batch_size={settings.batch_size} is not a multiple of "
                f"{section}.micro_batches={settings.micro_batches}"
            )
        return self


@functools.cache
def run_class(task: str) -> type[RunConfig]:
    """The class of a task's configurations.

    Raises:
      InputError: no such task.
    """
    if task not in tasks():
        nearest = difflib.get_close_matches(str(task), tasks(), n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(f"task: {task!r} is not known; {hint}accepted: {', '.join(tasks())}")
    algorithm = tasks()[task]
    section = section_of(algorithm.config, algorithm.hparams)
    fields: dict[str, Any] = {"task": (Literal[task], ...), algorithm.section: (section, section())}
    base = OnlineRunConfig if algorithm.online else OfflineRunConfig
    return pydantic.create_model(f"{task}_run", __base__=base, **fields)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Any:
    """Reads a YAML file, applies `section.key=value` overrides (values are YAML too) and validates the whole.

    Returns:
      An `OnlineRunConfig` or `OfflineRunConfig`, of the class of its task.

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


def parse_config(tree: dict[str, Any], where: str = "configuration") -> Any:
    """Validates an already parsed tree; see `load_config`."""
    if "task" not in tree:
        raise InputError(f"{where}: key 'task' is required; accepted: {', '.join(tasks())}")
    try:
        cls = run_class(tree["task"] if isinstance(tree["task"], str) else repr(tree["task"]))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    try:
        return cls.model_validate(_numbers(tree))
    except pydantic.ValidationError as error:
        lines = [_explain(cls, item) for item in error.errors()]
        raise InputError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def with_dtypes(config: RunConfig, hardware: str) -> Any:
    """`config` with the dtypes that it leaves open (null) filled in, for hardware that multiplies best in `hardware`.

    Weights are of that dtype, unless they are trained themselves and most of their steps would be lost in it: float16
    always, bfloat16 unless `adamw_8bit` rounds. Those are float32, and computed with in `hardware`.
    """

    def fill(section: Any, optimizer: OptimizerConfig | None = None) -> Any:
        if section.dtype is not None:
            return section
        coarse = hardware == "float16" or (hardware == "bfloat16" and optimizer and optimizer.name != "adamw_8bit")
        if optimizer and coarse:
            update = {"dtype": "float32", "compute_dtype": section.compute_dtype or hardware}
        else:
            update = {"dtype": hardware}
        return section.model_copy(update=update)

    def fill_rewards(entries: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        return tuple(fill(entry) if entry.kind == "model" else entry for entry in entries)

    full = config.adapter.type == "none"
    changes: dict[str, Any] = {"model": fill(config.model, config.optimizer if full else None)}
    if isinstance(config, OnlineRunConfig):
        changes |= {"reward": fill_rewards(config.reward), "judge": fill_rewards(config.judge)}
        if config.critic.name is not None:
            optimizer = config.critic.optimizer or config.optimizer
            changes["critic"] = fill(config.critic, optimizer if full else None)
    return config.model_copy(update=changes)


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


def _fields(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Names accepted beside the last part of `location`."""
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation if isinstance(part, str) else None
        sections = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
        model = sections[0] if sections else (RewardConfig if part in ("reward", "judge") else model)
    return list(model.model_fields)


def _explain(cls: type[RunConfig], error: Any) -> str:
    location = tuple(error["loc"])
    key = ".".join(str(part) for part in location) or "configuration"
    if error["type"] == "extra_forbidden":
        names = _fields(cls, location)
        nearest = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(names)}"
        return f"unknown key {key!r}; {hint}"
    if error["type"] == "missing":
        return f"key {key!r} is required"
    message = error["msg"].removeprefix("Value error, ")
    if not location and error["type"] == "value_error":
        return message
    found = "" if error["type"] == "value_error" else f"; found {error['input']!r}"
    return f"{key}: {message}{found}"

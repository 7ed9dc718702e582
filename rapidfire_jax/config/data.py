"""`data:` what a run learns from."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from rapidfire_jax.config.section import Positive, Range, Section

Format = Literal["prompt", "text", "prompt_completion", "chat", "preference", "labelled"]
Role = Literal["prompt", "text", "completion", "messages", "chosen", "rejected", "margin", "label", "split_place"]

DEFAULT_COLUMN = "prompt"
DEFAULT_SPLIT = "train"
DEFAULT_BUFFER = 1024


class DataConfig(Section):
    """Records of a file, folder, hub repository or function, and how they become prompts and examples."""

    path: Annotated[
        str | None,
        Field(min_length=1, description="file, folder, organisation/name[@revision], package:// or sdist://"),
    ] = None
    function: Annotated[
        str | None,
        Field(pattern=r"^[\w.]+:\w+$", description="package.module:function, which returns the records as dicts"),
    ] = None
    args: dict[str, Any] = Field(default_factory=dict, description="of the function")
    subset: Annotated[str | None, Field(min_length=1, description="configuration of a hub repository")] = None
    split: Annotated[str, Field(min_length=1, description="of a hub repository or folder")] = DEFAULT_SPLIT
    streaming: bool = Field(default=False, description="read while training, nothing is kept")
    shuffle_buffer: Positive = Field(default=DEFAULT_BUFFER, description="examples a stream shuffles among")
    format: Literal["auto", Format] = "auto"
    column: str = Field(default=DEFAULT_COLUMN, description="short for columns.prompt and columns.text")
    columns: dict[Role, str] = Field(default_factory=dict, description="role -> column, where they differ")
    where: dict[str, str] = Field(default_factory=dict, description="column -> value as text; other records are left")
    clean: bool | None = Field(
        default=None, description="<br /> tags and white space of prompts become one space; null: with prompt_tokens"
    )
    chat_template: bool = Field(default=False, description="plain texts become messages")
    prompt_tokens: tuple[Positive, Positive] | None = Field(default=None, description="cut prompts to so many tokens")
    max_prompt_length: Positive = Field(default=512, description="tokens of a prompt to roll out")
    max_length: Positive = Field(default=1024, description="tokens of prompt and completion")
    too_long: Literal["error", "drop", "truncate"] = Field(default="error", description="beyond max_length")
    unusable: Literal["error", "drop"] = Field(
        default="error", description="empty or equal completions, labels and margins that are not numbers"
    )
    train: Range = (0.0, 0.95)
    held_out: Range = (0.95, 1.0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> "DataConfig":
        self._check_source()
        for name, (low, high) in (("train", self.train), ("held_out", self.held_out)):
            if low >= high:
                raise ValueError(f"{name}: [{low}, {high}] is empty; give a lower and a higher fraction")
        if max(self.train[0], self.held_out[0]) < min(self.train[1], self.held_out[1]):
            raise ValueError(f"train {list(self.train)} and held_out {list(self.held_out)} overlap")
        if self.prompt_tokens and not self.prompt_tokens[0] <= self.prompt_tokens[1] <= self.max_prompt_length:
            raise ValueError(f"prompt_tokens {list(self.prompt_tokens)} must rise and stay within max_prompt_length")
        for role in ("prompt", "text"):
            named = self.columns.get(role, self.column)
            if self.column != DEFAULT_COLUMN and named != self.column:
                raise ValueError(f"column={self.column!r} and columns.{role}={named!r} differ; give one of them")
        return self

    def _check_source(self) -> None:
        if (self.path is None) == (self.function is None):
            found = "both" if self.path else "neither"
            raise ValueError(f"give either path or function; found {found}")
        if self.args and self.function is None:
            raise ValueError(f"args={self.args} has no effect without function")
        if self.function is not None:
            for name, default in (("subset", None), ("split", DEFAULT_SPLIT)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(f"{name}={value!r} has no effect with function; give it in args")
        if self.shuffle_buffer != DEFAULT_BUFFER and not self.streaming:
            raise ValueError(f"shuffle_buffer={self.shuffle_buffer} has no effect without streaming=true")

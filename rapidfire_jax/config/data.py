"""`data:` what a run learns from."""

from typing import Annotated

import pydantic
from pydantic import Field

from rapidfire_jax.config.section import Positive, Range, Section


class DataConfig(Section):
    """Prompts: one text column of a CSV or JSONL file, cut to its first tokens."""

    path: Annotated[str, Field(min_length=1, description="file, or package://DIST/FILE")]
    column: str = "prompt"
    where: dict[str, str] = {}
    chat_template: bool = False
    prompt_tokens: tuple[Positive, Positive] | None = None
    max_prompt_length: Positive = 512
    train: Range = (0.0, 0.95)
    held_out: Range = (0.95, 1.0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> "DataConfig":
        for name, (low, high) in (("train", self.train), ("held_out", self.held_out)):
            if low >= high:
                raise ValueError(f"{name}: [{low}, {high}] is empty; give a lower and a higher fraction")
        if max(self.train[0], self.held_out[0]) < min(self.train[1], self.held_out[1]):
            raise ValueError(f"train {list(self.train)} and held_out {list(self.held_out)} overlap")
        if self.prompt_tokens and not self.prompt_tokens[0] <= self.prompt_tokens[1] <= self.max_prompt_length:
            raise ValueError(f"prompt_tokens {list(self.prompt_tokens)} must rise and stay within max_prompt_length")
        return self

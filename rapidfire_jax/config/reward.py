"""`reward:` what scores a response."""

from typing import Annotated, Any

from pydantic import Field

from rapidfire_jax.config.section import Section


class RewardConfig(Section):
    """One reward function and its weight in the sum."""

    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$", description="package.module:function")]
    args: dict[str, Any] = {}
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0

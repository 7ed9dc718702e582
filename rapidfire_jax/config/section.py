"""What every section of a configuration is made of."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Range = tuple[Fraction, Fraction]
DType = Literal["float32", "bfloat16", "float16"]


class Section(pydantic.BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversion between types."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

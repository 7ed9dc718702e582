"""What every section of a configuration is made of."""

import dataclasses
import functools
import typing
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Range = tuple[Fraction, Fraction]
DType = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["int8", "int4", "nf4"]


class Section(pydantic.BaseModel):
    """Base of every section: frozen, no unknown keys, no NaN, no silent conversion between types."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@functools.cache
def section_of(*classes: type) -> type[Section]:
    """A section with the fields of some dataclasses: types, bounds and defaults stand there and nowhere else.

    Fields with metadata `{"section": "elsewhere"}` are left out.
    """
    fields: dict[str, Any] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            if field.metadata.get("section") != "elsewhere":
                fields[field.name] = (hints[field.name], field.default)
    return pydantic.create_model("_".join(cls.__name__ for cls in classes), __base__=Section, **fields)

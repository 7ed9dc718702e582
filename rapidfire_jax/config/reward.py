"""`reward:` what scores a response."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import Field

from rapidfire_jax.config.section import DType, Positive, Quantize, Section

KINDS = ("function", "model", "url")
# Settings that not every kind has, and the kinds that have them.
OWNERS = {
    "args": ("function",),
    "dtype": ("model",),
    "compute_dtype": ("model",),
    "quantize": ("model",),
    "quantize_vocabulary": ("model",),
    "max_length": ("model",),
    "text": ("model",),
    "chat_template": ("model",),
    "append_eos": ("model",),
    "batch_size": ("model", "url"),
    "timeout": ("url",),
    "retries": ("url",),
    "concurrency": ("url",),
    "headers": ("url",),
}
HEADER = re.compile(r"[!#$%&'*+.^`|~\w-]+", re.ASCII)
VARIABLE = re.compile(r"\$\{(\w+)\}")


class RewardConfig(Section):
    """One reward, which is a function, a neural reward model or an HTTP server, and its weight in the sum.

    Only the settings of its own kind can be given, and only these are written out.
    """

    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = Field(
        default=None, description="package.module:function"
    )
    model: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="sequence classifier with one label: folder, hub repository, or package://DIST/FILE"
    )
    url: str | None = Field(default=None, description="http:// or https:// address that takes POST requests")
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = Field(
        default=None, description="of the component in the metrics; null: the function's name, `model` or `url`"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the function")
    dtype: DType | None = Field(default=None, description="of the weights; null: as model.dtype")
    compute_dtype: DType | None = Field(default=None, description="of activations and products; null: the weights'")
    quantize: Quantize | None = Field(default=None, description="of the layers' matrices; null: as they are stored")
    quantize_vocabulary: Literal["int8"] | None = Field(default=None, description="of the embedding; null: dtype")
    max_length: Positive | None = Field(
        default=None, description="tokens; of a longer text the end counts; null: the model's context"
    )
    text: Literal["response", "prompt_response"] = Field(default="prompt_response", description="what the model reads")
    chat_template: bool = Field(default=False, description="score the conversation in the model's own template")
    append_eos: bool = Field(default=False, description="end every text with the model's end-of-sequence token")
    batch_size: Positive = Field(default=8, description="responses a forward pass or a request")
    timeout: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Field(
        default=60.0, description="seconds a request may take to connect, and between two pieces of the answer"
    )
    retries: Annotated[int, Field(ge=0)] = Field(default=3, description="after a request that may succeed later")
    concurrency: Positive = Field(default=4, description="requests at once")
    headers: dict[str, str] = Field(
        default_factory=dict, repr=False, description="of every request; ${NAME} stands for an environment variable"
    )

    @property
    def kind(self) -> str:
        """`function`, `model` or `url`."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @pydantic.field_validator("url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        """Never repeats the address: it may hold a password."""
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port)
        except ValueError:
            usable = False
        if not usable or re.search(r"\s", value):
            raise ValueError("not an address; write http://HOST[:PORT]/PATH or https://...")
        if "@" in parts.netloc:
            raise ValueError("holds a user name or password; send it in headers, from ${ENVIRONMENT_VARIABLE}")
        return value

    @pydantic.field_validator("headers", mode="before")
    @classmethod
    def _check_headers(cls, value: Any) -> Any:
        """Before pydantic looks at them, whose messages show what was found: these may be secrets."""
        if not isinstance(value, dict):
            raise ValueError(f"give names and values, such as Authorization: 'Bearer ${{TOKEN}}', not a {_type(value)}")
        for name, text in value.items():
            if not isinstance(name, str) or not HEADER.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a header")
            if not isinstance(text, str):
                raise ValueError(f"{name}: the value is a {_type(text)}; give a text, in quotes")
            if not text.isascii() or not text.isprintable():
                raise ValueError(f"{name}: the value holds a character that no header can hold; give printable ASCII")
            if "$" + "{" in VARIABLE.sub("", text):
                raise ValueError(f"{name}: an environment variable is written ${{NAME}}")
        return value

    @pydantic.model_validator(mode="after")
    def _check(self) -> "RewardConfig":
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give one of function, model and url; found {' and '.join(kinds) or 'none of them'}")
        for setting in sorted(self.model_fields_set & OWNERS.keys()):
            if kinds[0] not in OWNERS[setting]:
                raise ValueError(
                    f"{setting} is a setting of a reward by {' or '.join(OWNERS[setting])}, this one is by {kinds[0]}"
                )
        if self.chat_template and self.text == "response":
            raise ValueError("chat_template scores prompt and response, text: response leaves the prompt out; drop one")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _own_settings(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        others = {kind for kind in KINDS if kind != self.kind}
        foreign = {setting for setting, owners in OWNERS.items() if self.kind not in owners}
        return {key: value for key, value in handler(self).items() if key not in others | foreign}


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__

"""What fixes the shapes and the arithmetic of a decoder, whatever the family."""

import dataclasses

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.rope import Rope

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu")
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "max_positions", "norm_eps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of one decoder. Static under jit; `families` reads it from `config.json` and GGUF metadata."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    family: str = "llama"  # its `model_type`

    rope: Rope | None = dataclasses.field(default_factory=Rope)  # None: a learned table of positions
    local_rope: Rope | None = None  # of the local layers, where it differs
    sliding_window: int | None = None  # a token of a local layer sees itself and the window - 1 before it
    local_layers: tuple[int, ...] = ()

    attention_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    attention_soft_cap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_soft_cap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head

    norm: str = "rms"  # or "layer"
    norm_offset: float = 0.0  # added to the stored scale of an RMSNorm
    norm_eps: float = 1e-5
    post_norms: bool = False  # of what attention and MLP add to the residual stream
    parallel: bool = False  # attention and MLP read the same residual stream
    gated: bool = True  # MLP: down(act(gate(x)) * up(x)); otherwise down(act(up(x)))
    activation: str = "silu"
    scale_embedding: bool = False  # by hidden_size ** 0.5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in SIZES:
            if not getattr(self, name) > 0:
                raise InputError(f"model configuration: {name} must be positive, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model configuration: {self.num_heads} query heads are not a multiple of {self.num_kv_heads} kv heads"
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"model configuration: activation {self.activation!r} is not supported; known: {', '.join(ACTIVATIONS)}"
            )
        for rope in filter(None, (self.rope, self.local_rope)):
            self._check_rope(rope)
        if self.local_layers and not self.sliding_window:
            raise InputError(f"model configuration: sliding_window is {self.sliding_window}, but some layers are local")

    def _check_rope(self, rope: Rope) -> None:
        pairs = (rope.rotated(self.head_dim) + 1) // 2
        if not 0 < 2 * pairs <= self.head_dim:
            raise InputError(
                f"model configuration: {pairs} pairs of entries cannot be rotated in a head of width {self.head_dim}"
            )
        for factors in (rope.short_factors, rope.long_factors) if rope.type == "longrope" else ():
            if len(factors) != pairs:
                raise InputError(f"model configuration: {len(factors)} rope factors, expected {pairs}")

"""The parts of a decoder layer as Flax NNX modules.

Shapes: B sequences, S tokens, C keys, D width, N query heads, K key/value heads, H head width, F ffn width. A module
computes in the dtype of its input; norms and the attention's softmax are float32. Activations that a backward pass may
want are named, see `remat.py`; a name does nothing by itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels import Quantized, quantize_cache, rms_norm
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.flash_attention.api import flash_attention
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.products import matmul
from rapidfire_jax.models.quantization import dense, multiply, shape_of
from rapidfire_jax.models.rope import rotate

_tanh_gelu = partial(jax.nn.gelu, approximate=True)
ACTIVATION: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "relu": jax.nn.relu,
}


type Wanted = slice | Int[Array, "B T"]  # positions whose hidden states somebody reads: one span of all rows, or each's


def take(x: Float[Array, "B S D"], at: Wanted | None) -> Float[Array, "B T D"]:
    """`x` at the positions that are wanted; None: at all."""
    if at is None:
        return x
    return x[:, at] if isinstance(at, slice) else jnp.take_along_axis(x, at[:, :, None], axis=1)


class View(NamedTuple):
    """What the layers of one kind, local or global, see."""

    rotation: tuple[Float[Array, "B S half"], Float[Array, "B S half"]] | None  # cosines and sines
    window: Int[Array, ""] | int | None  # tokens that a token sees, itself included; None: all before it


class LayerCache(NamedTuple):
    """Keys and values of one layer: in the compute dtype, or int8 codes with a scale for each token and head."""

    keys: Float[Array, "B K C H"] | Int8[Array, "B K C H"]
    values: Float[Array, "B K C H"] | Int8[Array, "B K C H"]
    key_scales: Float[Array, "B K C"] | None = None
    value_scales: Float[Array, "B K C"] | None = None

    @classmethod
    def of(cls, keys: Float[Array, "*M H"], values: Float[Array, "*M H"], *, int8: bool) -> "LayerCache":
        """What stands in a cache for some keys and values, whatever their leading axes."""
        if not int8:
            return cls(keys, values)
        (key_codes, key_scales), (value_codes, value_scales) = quantize_cache(keys), quantize_cache(values)
        return cls(key_codes, value_codes, key_scales, value_scales)


class Slots(NamedTuple):
    """The cache of one layer, and where in it each row's sequence stands."""

    cache: LayerCache
    starts: Int[Array, " B"]  # slot of the first token
    ends: Int[Array, " B"]  # slot after the last one, where the next is written

    def write(self, keys: Float[Array, "B K H"], values: Float[Array, "B K H"]) -> LayerCache:
        """The cache with the next token of each row in it."""
        new = LayerCache.of(keys, values, int8=self.cache.key_scales is not None)
        rows = jnp.arange(len(self.ends))
        return jax.tree.map(lambda cached, x: cached.at[rows, :, self.ends].set(x), self.cache, new)


class Linear(nnx.Module):
    """`x W + b`, plus `scale * (x A) B` once `add_lora` has been called. W may be quantised; it is frozen then."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None
        self.lora_scale: float | None = None

    def add_lora(self, rank: int, scale: float, key: Array) -> None:
        """Adds adapter leaves: A uniform as in `peft` (Kaiming, a=sqrt 5), B zero, so that nothing changes at first."""
        *layers, in_features, out_features = shape_of(self.kernel.get_value())
        bound = in_features**-0.5
        self.lora_a = nnx.LoRAParam(jax.random.uniform(key, (*layers, in_features, rank), jnp.float32, -bound, bound))
        self.lora_b = nnx.LoRAParam(jnp.zeros((*layers, rank, out_features), jnp.float32))
        self.lora_scale = scale

    def settle_lora(self, dtype: DTypeLike) -> None:
        """Brings adapter leaves, if there are any, into the form that a product with inputs of `dtype` takes."""
        if self.lora_scale is not None:
            self.lora_a = nnx.LoRAParam(self.lora_a[...].astype(dtype))
            self.lora_b = nnx.LoRAParam((self.lora_b[...] * self.lora_scale).astype(dtype))
            self.lora_scale = 1.0

    def fold_lora(self, dtype: DTypeLike) -> None:
        """Adds the adapter, if there is one, to the kernel, where that rounds no more than products with `dtype` do."""
        kernel = self.kernel.get_value()
        if self.lora_scale is not None and getattr(kernel, "dtype", None) == dtype == jnp.float32:
            self.kernel = nnx.Param(self.merged(jnp.float32))
            del self.lora_a, self.lora_b
            self.lora_scale = None

    def __call__(self, x: Float[Array, "*M in"]) -> Float[Array, "*M out"]:
        """The product, in the dtype of `x`."""
        y = multiply(x, self.kernel.get_value())
        if self.bias is not None:
            y += jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)
        if self.lora_scale is not None:
            narrow = checkpoint_name(matmul(x, self.lora_a[...].astype(x.dtype)), "lora")
            y += matmul(narrow, (self.lora_b[...] * self.lora_scale).astype(x.dtype))
        return y

    def merged(self, dtype: DTypeLike, layer: int | None = None) -> Float[Array, "*L in out"]:
        """The kernel of all layers or of one with its adapter folded in; in `dtype` if it was quantised."""
        kernel, *adapter = (
            x if layer is None else jax.tree.map(lambda w: w[layer], x)
            for x in (self.kernel.get_value(), *self._adapter())
        )
        dtype = dtype if isinstance(kernel, Quantized) else kernel.dtype
        if adapter:
            delta = jnp.einsum("...ir,...ro->...io", *adapter, precision="highest")
            return (dense(kernel, jnp.float32) + delta).astype(dtype)
        return dense(kernel, dtype)

    def _adapter(self) -> list[Array]:
        return [] if self.lora_scale is None else [self.lora_a[...], self.lora_b[...] * self.lora_scale]


class RMSNorm(nnx.Module):
    """Zhang and Sennrich 2019, statistics in float32; so is the scale if an `offset` is added to it (Gemma: 1)."""

    def __init__(self, features: int, eps: float, offset: float = 0.0, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.full((features,), 1 - offset, dtype))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*M D"]) -> Float[Array, "*M D"]:
        """`x` with a root mean square of 1, times the scale."""
        return rms_norm(x, self.scale[...], eps=self.eps, offset=self.offset)

    def add(self, x: Float[Array, "*M D"], update: Float[Array, "*M D"]) -> tuple[Array, Array]:
        """The sum of both, normalised, and the sum itself."""
        return rms_norm(update, self.scale[...], x, eps=self.eps, offset=self.offset)


class LayerNorm(nnx.Module):
    """Ba et al. 2016, in float32."""

    def __init__(self, features: int, eps: float, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.Param(jnp.zeros((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*M D"]) -> Float[Array, "*M D"]:
        """`x` with mean 0 and variance 1, times the scale, plus the bias."""
        x32 = x.astype(jnp.float32)
        x32 -= x32.mean(axis=-1, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale, bias = (jnp.broadcast_to(p[...].astype(jnp.float32), x.shape) for p in (self.scale, self.bias))
        return (x32 * scale + bias).astype(x.dtype)

    def add(self, x: Float[Array, "*M D"], update: Float[Array, "*M D"]) -> tuple[Array, Array]:
        """The sum of both, normalised, and the sum itself."""
        total = checkpoint_name(x + update, "residual")
        return self(total), total


def make_norm(config: DecoderConfig, *, dtype: DTypeLike) -> RMSNorm | LayerNorm:
    """The norm of the residual stream."""
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
    return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset, dtype=dtype)


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(Linear, dtype=dtype, rngs=rngs)
        norm = partial(make_norm, config, dtype=dtype)
        head_norm = partial(RMSNorm, config.head_dim, config.norm_eps, config.norm_offset, dtype=dtype)
        D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
        self.config = config
        self.attention_norm = norm()
        self.q_proj = linear(D, config.num_heads * H, bias=config.qkv_bias)
        self.k_proj = linear(D, config.num_kv_heads * H, bias=config.qkv_bias)
        self.v_proj = linear(D, config.num_kv_heads * H, bias=config.qkv_bias)
        self.q_norm = head_norm() if config.qk_norm else None
        self.k_norm = head_norm() if config.qk_norm else None
        self.o_proj = linear(config.num_heads * H, D, bias=config.output_bias)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        self.gate_proj = linear(D, F, bias=config.mlp_bias) if config.gated else None
        self.up_proj = linear(D, F, bias=config.mlp_bias)
        self.down_proj = linear(F, D, bias=config.mlp_bias)
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        view: View,
        segments: Int[Array, "B S"] | None = None,
        slots: Slots | None = None,
        at: Wanted | None = None,
    ):
        """Returns the new residual stream, with `at` of these positions alone, and this layer's keys and values.

        Either `segments` say which tokens of `x` see each other, or `x` is one token a row that is added to `slots`;
        then the cache with it takes the place of keys and values.
        """
        normed = checkpoint_name(self.attention_norm(x), "attention_norm")
        attended, pair = self._attention(normed, view, segments, slots, at)
        x = take(x, at)
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(checkpoint_name(attended, "attention_update"))
        if self.config.parallel:
            return x + attended + self._mlp(checkpoint_name(self.mlp_norm(x), "mlp_norm")), pair
        normed, x = self.mlp_norm.add(x, attended)
        update = self._mlp(checkpoint_name(normed, "mlp_norm"))
        if self.mlp_post_norm is not None:
            update = self.mlp_post_norm(checkpoint_name(update, "mlp_update"))
        return x + update, pair

    def _attention(self, x, view: View, segments, slots: Slots | None, at: Wanted | None):
        B, S, _ = x.shape
        q, k, v = (proj(x).reshape(B, S, -1, self.config.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        v = checkpoint_name(v, "value")
        if self.q_norm is not None and self.k_norm is not None:  # whose backward passes want what goes in
            q, k = self.q_norm(checkpoint_name(q, "query")), self.k_norm(checkpoint_name(k, "key"))
        if view.rotation is not None:
            q, k = rotate(q, *view.rotation), rotate(k, *view.rotation)
        if self.q_norm is None:
            q, k = checkpoint_name(q, "query"), checkpoint_name(k, "key")
        scale, soft_cap = self.config.attention_scale, self.config.attention_soft_cap
        seen: Any = (k, v)
        if slots is None:
            mixed = flash_attention(q, k, v, segments=segments, window=view.window, scale=scale, soft_cap=soft_cap).out
        else:
            seen = slots.write(k[:, 0], v[:, 0])
            ends, starts = slots.ends + 1, slots.starts
            if view.window is not None:
                starts = jnp.maximum(starts, ends - view.window)
            cached = {"key_scales": seen.key_scales, "value_scales": seen.value_scales, "starts": starts}
            mixed = decode_attention(q[:, 0], seen.keys, seen.values, ends, scale=scale, soft_cap=soft_cap, **cached)
        return self.o_proj(take(mixed.reshape(B, S, -1), at)), seen

    def _mlp(self, x):
        act = ACTIVATION[self.config.activation]
        up = checkpoint_name(self.up_proj(x), "up")
        hidden = act(up) if self.gate_proj is None else act(checkpoint_name(self.gate_proj(x), "gate")) * up
        return self.down_proj(checkpoint_name(hidden, "mlp_hidden"))

"""The Llama decoder as Flax NNX modules: layers stacked on a leading axis, run by `lax.scan`.

Shapes: B sequences, S tokens, C cache slots, D width, N query heads, K key/value heads, H head width, F ffn width,
V vocabulary, L layers. Activations have the dtype of the embedding table; norms, rotary angles and softmax are float32.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, one pair of arrays a layer."""

    keys: tuple[Float[Array, "B C K H"], ...]
    values: tuple[Float[Array, "B C K H"], ...]
    valid: Bool[Array, "B C"]  # True where a real token stands; padding stays False
    length: Int[Array, ""]  # slots written, the same for every row


class Linear(nnx.Module):
    """`x W`, plus `scale * (x A) B` once `add_lora` has been called."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), dtype))
        self.lora_scale: float | None = None

    def add_lora(self, rank: int, scale: float, key: Array) -> None:
        """Adds adapter leaves: A uniform as in `peft` (Kaiming, a=sqrt 5), B zero, so that nothing changes at first."""
        *layers, in_features, out_features = self.kernel.shape
        bound = in_features**-0.5
        self.lora_a = nnx.LoRAParam(jax.random.uniform(key, (*layers, in_features, rank), jnp.float32, -bound, bound))
        self.lora_b = nnx.LoRAParam(jnp.zeros((*layers, rank, out_features), jnp.float32))
        self.lora_scale = scale

    def __call__(self, x: Float[Array, "*M in"]) -> Float[Array, "*M out"]:
        """The product, in the dtype of `x`."""
        y = x @ self.kernel[...]
        if self.lora_scale is not None:
            y += (x @ self.lora_a[...].astype(x.dtype)) @ (self.lora_b[...] * self.lora_scale).astype(x.dtype)
        return y


class RMSNorm(nnx.Module):
    """Zhang and Sennrich 2019, statistics in float32."""

    def __init__(self, features: int, eps: float, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*M D"]) -> Float[Array, "*M D"]:
        """`x` with a root mean square of 1, times the scale."""
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * jnp.broadcast_to(self.scale[...], x.shape)


def rotary_angles(positions: Int[Array, "B S"], head_dim: int, theta: float) -> Float[Array, "B S half"]:
    """Angle of each position and frequency, in radians (Su et al. 2021, eq. 15)."""
    inverse = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[..., None].astype(jnp.float32) * inverse[None, None]


def rotate(x: Float[Array, "B S heads H"], angles: Float[Array, "B S half"]) -> Float[Array, "B S heads H"]:
    """Rotates the halves of the head width against one another, as Hugging Face checkpoints expect."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B S N H"], k: Float[Array, "B C K H"], v: Float[Array, "B C K H"], mask: Bool[Array, "B S C"]
) -> Float[Array, "B S N H"]:
    """Grouped-query attention with a float32 softmax. A query that may see no key gets a finite, meaningless row."""
    B, S, N, H = q.shape
    grouped = q.reshape(B, S, k.shape[2], N // k.shape[2], H)
    scores = jnp.einsum("bskgh,bckh->bkgsc", grouped, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgsc,bckh->bskgh", weights, v).reshape(B, S, N, H)


class Block(nnx.Module):
    """One layer: attention and SwiGLU, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(Linear, dtype=dtype, rngs=rngs)
        D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
        self.attention_norm = RMSNorm(D, config.norm_eps, dtype=dtype)
        self.q_proj = linear(D, config.num_heads * H)
        self.k_proj = linear(D, config.num_kv_heads * H)
        self.v_proj = linear(D, config.num_kv_heads * H)
        self.o_proj = linear(config.num_heads * H, D)
        self.mlp_norm = RMSNorm(D, config.norm_eps, dtype=dtype)
        self.gate_proj = linear(D, F)
        self.up_proj = linear(D, F)
        self.down_proj = linear(F, D)
        self.head_dim = H

    def __call__(self, x, angles, mask, *, cache=None, slot=None):
        """Returns the new residual stream and this layer's keys and values (those of the whole cache, if given).

        `cache` is a pair `[B, C, K, H]`; the S tokens of `x` are written to it from `slot` on.
        """
        B, S, _ = x.shape
        normed = self.attention_norm(x)
        q, k, v = (proj(normed).reshape(B, S, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
        x += self.o_proj(attend(q, k, v, mask).reshape(B, S, -1))
        normed = self.mlp_norm(x)
        gated = jax.nn.silu(self.gate_proj(normed)) * self.up_proj(normed)
        return x + self.down_proj(gated), (k, v)


class CausalLM(nnx.Module):
    """A decoder with its language-model head and, after `add_value_head`, a critic on the same trunk.

    Args of every forward: `tokens [B, S]` int32; `mask [B, S]` True at real tokens (padding may stand on either side);
    `positions [B, S]` int32, by default counted over the real tokens of a row.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.config = config
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        stacked = nnx.vmap(lambda rngs: Block(config, dtype=dtype, rngs=rngs))
        self.blocks = stacked(rngs.split(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.lm_head = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))

        self.has_value_head = False
        self.is_split = False

    def split_blocks(self, top: int) -> None:
        """Moves the last `top` layers into a stack of their own, `top_blocks`; adapters can stand on these alone."""
        if not 0 < top <= self.config.num_layers:
            raise InputError(
                f"adapter.layers={top}: the model has {self.config.num_layers} layers; accepted: 1 to that"
            )
        if top < self.config.num_layers:
            graphdef, stacked = nnx.split(self.blocks)
            cut = self.config.num_layers - top
            self.top_blocks = nnx.merge(graphdef, jax.tree.map(lambda w: w[cut:], stacked))
            self.blocks = nnx.merge(graphdef, jax.tree.map(lambda w: w[:cut], stacked))
            self.is_split = True

    @property
    def stacks(self) -> list[Block]:
        """The stacks of layers from bottom to top: one, or two after `split_blocks`."""
        return [self.blocks, self.top_blocks] if self.is_split else [self.blocks]

    def add_value_head(self) -> None:
        """Adds a zero-initialised linear critic: every value is 0 until it has been trained."""
        self.value_kernel = ValueParam(jnp.zeros((self.config.hidden_size,), jnp.float32))
        self.value_bias = ValueParam(jnp.zeros((), jnp.float32))
        self.has_value_head = True

    @property
    def head(self) -> Float[Array, "V D"]:
        """Rows of the language-model head; the embedding itself where they are tied."""
        return (self.embedding if self.config.tie_embeddings else self.lm_head)[...]

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        remat: bool = False,
    ) -> Float[Array, "B S D"]:
        """Hidden states after the final norm; `remat` recomputes each layer in the backward pass."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        return self.upper(self.lower(tokens, mask, positions), mask, positions, remat=remat)

    def lower(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], positions: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """Residual stream below the last stack: the embedding, and the lower layers after `split_blocks`."""
        x = self.embedding[...][tokens]
        for stack in self.stacks[:-1]:
            x, _ = self._scan(stack, x, mask, positions)
        return x

    def upper(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        *,
        remat: bool = False,
    ) -> Float[Array, "B S D"]:
        """From the residual stream of `lower` to the hidden states after the final norm."""
        return self.norm(self._scan(self.stacks[-1], x, mask, positions, remat=remat)[0])

    def prefill(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], slots: int
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Like `hidden`, and a cache of `slots` >= S places a row whose first S hold these tokens."""
        room = slots - tokens.shape[1]
        keys: list[Array] = []
        values: list[Array] = []
        x = self.embedding[...][tokens]
        for stack in self.stacks:
            x, pair = self._scan(stack, x, mask, None, keep_cache=True)
            for layers, stacked in zip((keys, values), pair, strict=True):
                layers.extend(jnp.pad(stacked, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))))
        valid = jnp.pad(mask, ((0, 0), (0, room)))
        return self.norm(x), KVCache(tuple(keys), tuple(values), valid, jnp.asarray(tokens.shape[1], jnp.int32))

    def _scan(self, stack, x, mask, positions, *, remat: bool = False, keep_cache: bool = False):
        """Runs a stack over the residual stream; returns it and, if asked for, every layer's keys and values."""
        positions = count_positions(mask) if positions is None else positions
        visible = mask[:, None, :] & jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        graphdef, layers = nnx.split(stack)

        def step(x, weights):
            x, pair = nnx.merge(graphdef, weights)(x, angles, visible)
            return x, pair if keep_cache else None

        return jax.lax.scan(jax.checkpoint(step) if remat else step, x, layers)

    def layers(self) -> list[Block]:
        """The blocks one by one, for `decode`: sliced here once instead of in every step."""
        blocks = []
        for stack in self.stacks:
            graphdef, stacked = nnx.split(stack)
            count = len(stack.q_proj.kernel[...])
            blocks += [nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], stacked)) for i in range(count)]
        return blocks

    def decode(
        self,
        layers: list[Block],
        cache: KVCache,
        token: Int[Array, "B"],
        mask: Bool[Array, "B"],
        position: Int[Array, "B"],
    ) -> tuple[Float[Array, "B D"], KVCache]:
        """Appends one token a row to the cache (`mask` False: padding that nothing will see); its hidden state."""
        slot = cache.length
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, mask[:, None], slot, axis=1)
        angles = rotary_angles(position[:, None], self.config.head_dim, self.config.rope_theta)
        x = self.embedding[...][token[:, None]]
        pairs = []
        for block, *pair in zip(layers, cache.keys, cache.values, strict=True):
            x, written = block(x, angles, valid[:, None, :], cache=pair, slot=slot)
            pairs.append(written)
        keys, values = zip(*pairs, strict=True)
        return self.norm(x)[:, 0], KVCache(keys, values, valid, slot + 1)

    def logits(self, hidden: Float[Array, "*M D"]) -> Float[Array, "*M V"]:
        """Float32 logits of hidden states."""
        return jnp.einsum("...d,vd->...v", hidden, self.head, preferred_element_type=jnp.float32)

    def value(self, hidden: Float[Array, "*M D"]) -> Float[Array, "*M"]:
        """Critic's estimate from hidden states, float32."""
        return hidden.astype(jnp.float32) @ self.value_kernel[...] + self.value_bias[...]

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Logits of every position, float32."""
        return self.logits(self.hidden(tokens, mask, positions))


class ValueParam(nnx.Param):
    """Weights of the critic's head."""


def count_positions(mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Position of each real token among the real tokens of its row; 0 at left padding."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)

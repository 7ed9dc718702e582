"""The trunk of every model: embedding, layers stacked on a leading axis and run by `lax.scan`, final norm.

Shapes: B sequences, S tokens, C cache slots, D width, K key/value heads, H head width, V vocabulary, L layers.

Sequences come with a `mask [B, S]`: bool, True at real tokens, padding on either side; or, for several sequences packed
into one row, int32 segment ids, 0 at padding. A token sees its own segment only, and positions count from its start.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import hopper
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.layers import Block, LayerCache, Linear, Slots, View, Wanted, make_norm
from rapidfire_jax.models.quantization import is_quantized, outputs_first, rows_of
from rapidfire_jax.models.remat import Group, Remat, checkpointed
from rapidfire_jax.models.rope import rotations

type Mask = Bool[Array, "B S"] | Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far."""

    layers: tuple[LayerCache, ...]
    starts: Int[Array, " B"]  # slot of a row's first real token
    ends: Int[Array, " B"]  # slot after its last one


class Layer(NamedTuple):
    """One block of a stack, taken apart."""

    graphdef: nnx.GraphDef
    stack: nnx.State
    place: int

    @property
    def weights(self) -> nnx.State:
        """Its own."""
        return jax.tree.map(lambda w: w[self.place], self.stack)


@dataclasses.dataclass(frozen=True)
class Precision:
    """In what a model computes; its weights have dtypes of their own. Norms, softmax and statistics stay float32."""

    compute: str | None = None  # of activations, matrix products and the cache; None: the weights'
    output: str = "float32"  # of logits


AS_STORED = Precision()


class Decoder(nnx.Module):
    """Token ids -> hidden states. Heads stand on it: `CausalLM`, `RewardModel`.

    Args of every forward: `tokens [B, S]` int32; `mask [B, S]`, see above, by default all real; `positions [B, S]`
    int32, by default counted over the real tokens of a sequence. With `at`, a slice of all rows or indices `[B, T]`,
    hidden states of these alone are returned, and of the others the last layer computes nothing but keys and values.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        precision: Precision = AS_STORED,
        rngs: nnx.Rngs,
    ):
        init = jax.nn.initializers.normal(0.02)
        self.config = config
        self.precision = precision
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        if config.rope is None:
            table = init(rngs.params(), (config.max_positions, config.hidden_size), dtype)
            self.position_embedding = nnx.Param(table)
        stacked = nnx.vmap(lambda rngs: Block(config, dtype=dtype, rngs=rngs))
        self.blocks = stacked(rngs.split(config.num_layers))
        self.norm = make_norm(config, dtype=dtype)
        self.is_split = False
        self.init_head(dtype=dtype, rngs=rngs)

    def init_head(self, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Adds what a subclass has beside the trunk."""

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

    @property
    def has_adapters(self) -> bool:
        """Whether `add_lora` has been called."""
        return any(linear.lora_scale is not None for linear in _linears(self.stacks[-1]))

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations and cache."""
        return jnp.dtype(self.precision.compute or self.weight_dtype)

    @property
    def weight_dtype(self) -> jnp.dtype:
        """Dtype of weights that are not quantised: the embedding's, or the norm's if the embedding is."""
        return (self.norm.scale if is_quantized(self.embedding.get_value()) else self.embedding).dtype

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        mask: Mask | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        at: Wanted | None = None,
        remat: Remat | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm.

        `remat` says what the backward pass computes again of the layers that are trained: those with adapters, or all.
        """
        cut, _ = self.numbered_stacks()[-1]
        below = None
        if remat is not None and not self.has_adapters:
            below, remat = remat.part(0, cut), remat.part(cut, self.config.num_layers)
        return self.upper(self.lower(tokens, mask, positions, remat=below), mask, positions, at=at, remat=remat)

    def hidden_states(
        self, tokens: Int[Array, "B S"], mask: Mask | None = None, positions: Int[Array, "B S"] | None = None
    ) -> Float[Array, "L+1 B S D"]:
        """The embedding and the residual stream after each layer; the last one after the final norm."""
        mask, positions = _complete(tokens, mask, positions)
        x = self._embed(tokens, positions)
        states = [x[None]]
        for first, stack in self.numbered_stacks():
            x, after = self._scan(first, stack, x, mask, positions, keep=lambda x, pair: x)
            states.extend(after)
        return jnp.concatenate([*states[:-1], states[-1][:-1], self.norm(x)[None]])

    def lower(
        self,
        tokens: Int[Array, "B S"],
        mask: Mask | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        remat: Remat | None = None,
    ) -> Float[Array, "B S D"]:
        """Residual stream below the last stack: the embedding, and the lower layers after `split_blocks`."""
        mask, positions = _complete(tokens, mask, positions)
        x = self._embed(tokens, positions)
        for first, stack in self.numbered_stacks()[:-1]:
            x, _ = self._scan(first, stack, x, mask, positions, remat=remat)
        return x

    def upper(
        self,
        x: Float[Array, "B S D"],
        mask: Mask | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        at: Wanted | None = None,
        remat: Remat | None = None,
    ) -> Float[Array, "B T D"]:
        """From the residual stream of `lower` to the hidden states after the final norm."""
        mask, positions = _complete(x[..., 0], mask, positions)
        first, stack = self.numbered_stacks()[-1]
        return self.norm(self._scan(first, stack, x, mask, positions, at=at, remat=remat)[0])

    def prefill(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        slots: int,
        *,
        at: Wanted | None = None,
        int8: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Like `hidden` for left-padded tokens, and a cache of `slots` >= S places a row with these in the first S.

        The kernel that reads it wants a multiple of 8, which it is rounded up to. With `int8` the cache holds 8-bit
        codes; these tokens themselves still see exact keys and values.
        """
        positions = count_positions(mask)
        room = -(-slots // 8) * 8 - tokens.shape[1]
        layers: list[LayerCache] = []
        x = self._embed(tokens, positions)
        for first, stack in self.numbered_stacks():
            of_stack = at if stack is self.stacks[-1] else None
            x, kept = self._scan(first, stack, x, mask, positions, at=of_stack, keep=partial(_kept, int8=int8))
            for part in kept:
                for i in range(len(part.keys)):
                    layers.append(jax.tree.map(lambda s, i=i: _with_room(s[i], room), part))
        ends = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        starts = ends - mask.sum(axis=1, dtype=jnp.int32)
        return self.norm(x), KVCache(tuple(layers), starts, ends)

    def layers(self) -> list[Layer]:
        """The blocks one by one, for `decode`, with adapters that no step needs to convert or scale again.

        On a Hopper GPU they share their stack: what is cut out of it beside the kernel that reads it is never copied.
        Elsewhere it would be in every step, and so is cut out here; on a CPU in the order that suits few rows, and with
        adapters added to weights in float32.
        """
        layers = []
        for stack in map(nnx.clone, self.stacks):
            for linear in _linears(stack):
                linear.settle_lora(self.compute_dtype)
            whole, size = nnx.split(stack), stack_size(stack)
            if hopper.why_not_hopper():
                layers += [_cut_out(*whole, i, self.compute_dtype) for i in range(size)]
            else:
                layers += [Layer(*whole, i) for i in range(size)]
        return layers

    def decode(
        self,
        layers: list[Layer],
        cache: KVCache,
        token: Int[Array, " B"],
        mask: Bool[Array, " B"],
    ) -> tuple[Float[Array, "B D"], KVCache]:
        """Adds one token to each row of the cache; its hidden state. Where `mask` is False, the row stays as it was."""
        positions = (cache.ends - cache.starts)[:, None]
        x = self._embed(token[:, None], positions)
        views = self._views(positions)
        written = []
        for i, (layer, cached) in enumerate(zip(layers, cache.layers, strict=True)):
            view = views[i in self.config.local_layers]
            x, now = _decode_layer(layer.graphdef, layer.weights, x, view, Slots(cached, cache.starts, cache.ends))
            written.append(now)
        return self.norm(x)[:, 0], KVCache(tuple(written), cache.starts, cache.ends + mask.astype(jnp.int32))

    def _embed(self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        x = rows_of(self.embedding.get_value(), tokens, self.compute_dtype)
        if self.config.scale_embedding:
            x *= jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        if self.config.rope is None:  # positions beyond the table become NaN, not its last row
            x += self.position_embedding[...].at[positions].get(mode="fill", fill_value=jnp.nan).astype(x.dtype)
        return x

    def numbered_stacks(self) -> list[tuple[int, Block]]:
        """Number of the first layer of each stack, and the stack."""
        return list(zip((0, stack_size(self.blocks)), self.stacks, strict=False))

    def _views(self, positions: Int[Array, "B S"]) -> tuple[View, View]:
        """What global and local layers see."""
        config = self.config
        rotation = None if config.rope is None else rotations(config.rope, positions, config.head_dim)
        local = rotation if config.local_rope is None else rotations(config.local_rope, positions, config.head_dim)
        return View(rotation, None), View(local, config.sliding_window)

    def _scan(self, first: int, stack: Block, x, mask, positions, *, at=None, remat: Remat | None = None, keep=None):
        """Runs a stack over the residual stream; returns it and what `keep(x, (keys, values))` takes of each layer.

        The latter is a list of parts, whose arrays are stacked; of a stack with `at`, the last layer is one of its own.
        """
        segments = mask.astype(jnp.int32)
        views = self._views(positions)
        is_local = [i in self.config.local_layers for i in range(first, first + stack_size(stack))]
        graphdef, layers = nnx.split(stack)

        def run(x, weights, view, at=None):
            x, pair = nnx.merge(graphdef, weights)(x, view, segments, at=at)
            return x, None if keep is None else keep(x, pair)

        def step(x, layer):
            weights, local = layer
            if len(set(is_local)) == 1:
                view = views[is_local[0]]
            else:
                everything = views[0]._replace(window=x.shape[1])
                view = jax.tree.map(lambda far, near: jnp.where(local, near, far), everything, views[1])
            return run(x, weights, view)

        size, kept = len(is_local), []
        spans: list[tuple[int, int, Group | None]] = [(0, size, None)] if remat is None else [*remat.spans(size)]
        alone = at is not None or size == 1
        if alone:
            start, stop, group = spans[-1]
            spans[-1] = start, stop - 1, group
        for start, stop, group in spans:
            if start < stop:
                x, part = _scan_part(step, group, x, (layers, jnp.array(is_local)), start, stop)
                kept.append(part)
        if alone:
            last = checkpointed(partial(run, view=views[is_local[-1]], at=at), group, 1)
            x, part = last(x, jax.tree.map(lambda w: w[-1], layers))
            kept.append(jax.tree.map(lambda of_layer: of_layer[None], part))
        return x, kept


def _scan_part(step, group: Group | None, x, xs, start: int, stop: int):
    """Scans over some layers of a stack. Beside adapters, weights are not cut, which would copy them, but indexed."""
    if stop - start == len(xs[1]):
        return jax.lax.scan(checkpointed(step, group, stop - start), x, xs)
    adapters, frozen = nnx.split_state(xs[0], nnx.LoRAParam, ...)
    cut = lambda tree: jax.tree.map(lambda w: w[start:stop], tree)  # noqa: E731
    if group is not None and not jax.tree.leaves(adapters):  # trained weights: gradients would be added layer by layer
        return jax.lax.scan(checkpointed(step, group, stop - start), x, cut(xs))

    def indexed(x, layer):
        i, adapters, local = layer
        weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), frozen)
        return step(x, (nnx.merge_state(adapters, weights), local))

    own = jnp.arange(start, stop), cut(adapters), cut(xs[1])
    return jax.lax.scan(checkpointed(indexed, group, stop - start), x, own)


@partial(jax.jit, static_argnums=0)
def _decode_layer(graphdef: nnx.GraphDef, weights: nnx.State, x: Array, view: View, slots: Slots):
    """One layer of `decode`; jitted so that the kernels of all layers alike are traced and lowered once."""
    return nnx.merge(graphdef, weights)(x, view, slots=slots)


def _linears(block: Block) -> list[Linear]:
    return [part for _, part in nnx.iter_graph(block) if isinstance(part, Linear)]


def _cut_out(graphdef: nnx.GraphDef, stacked: nnx.State, i: int, dtype: DTypeLike) -> Layer:
    """Layer i in a stack of its own."""
    weights = jax.tree.map(lambda w: w[i : i + 1], stacked)
    if hopper.device_kind() == "cpu":
        block = nnx.merge(graphdef, weights)
        for linear in _linears(block):
            linear.fold_lora(dtype)
        graphdef, weights = nnx.split(block)
        # Behind a barrier, or the loop would turn the weights around in another copy.
        weights = jax.lax.optimization_barrier(outputs_first(weights))
    return Layer(graphdef, weights, 0)


def stack_size(stack: Block) -> int:
    """Number of layers in a stack."""
    return stack.mlp_norm.scale.shape[0]


def _kept(x: Array, pair: tuple[Array, Array], *, int8: bool) -> LayerCache:
    """What the cache takes of a layer's keys and values `[B, S, K, H]`."""
    return LayerCache.of(*(jnp.swapaxes(part, 1, 2) for part in pair), int8=int8)


def _with_room(cached: Array, room: int) -> Array:
    """More slots at the end of `[B, K, S, ...]`."""
    return jnp.pad(cached, ((0, 0), (0, 0), (0, room), *((0, 0),) * (cached.ndim - 3)))


def count_positions(mask: Mask) -> Int[Array, "B S"]:
    """Position of each real token among those of its row or segment; 0 at left padding."""
    real = mask.astype(bool)
    counted = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    if mask.dtype == bool:
        return jnp.maximum(counted, 0)
    opens = real & (mask != jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1])
    return jnp.maximum(counted - jax.lax.cummax(jnp.where(opens, counted, 0), axis=1), 0)


def _complete(tokens: Array, mask: Mask | None, positions: Array | None) -> tuple[Mask, Array]:
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    return mask, count_positions(mask) if positions is None else positions

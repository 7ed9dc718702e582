"""Sampling whole responses as one program: prefill, then a `while_loop` over a key/value cache.

All rows at once, until the last has ended; or, with a smaller decode batch, continuously: a lane of it whose row
has ended takes the next one, so that unequal lengths leave few lanes idle. Of several responses to a prompt, all start
from one prefill.
"""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import sample

if TYPE_CHECKING:
    from rapidfire_jax.models.decoder import KVCache
    from rapidfire_jax.models.heads import CausalLM


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What fixes the shape of the sampling program. Static under jit."""

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int = 0  # stands after EOS; no result depends on it
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False
    int8_cache: bool = False  # keys and values in 8 bits
    decode_batch_size: int | None = None  # rows decoded at a time; None: all
    samples_per_prompt: int = 1


class Generation(NamedTuple):
    """Responses and what the policy thought of them while it sampled."""

    tokens: Int[Array, "B S"]  # left-padded prompt, then T response tokens
    attention_mask: Bool[Array, "B S"]
    mask_t: Bool[Array, "B T"]  # True on response tokens up to and including EOS
    ended: Bool[Array, " B"]  # the response has an EOS
    logp_t: Float[Array, "B T"]  # nats at the given temperature, of the whole distribution; 0 after EOS
    v_t: Float[Array, "B T"]  # critic's values; 0 after EOS and for a model without value head


def loop_trips(rows: int, config: SamplingConfig) -> tuple[int, ...]:
    """How often the loops of the program go round, the outer one first, if every response has its full length."""
    T, lanes = config.max_new_tokens, config.decode_batch_size
    if lanes is None or lanes >= rows:
        return (T,)
    R = _prefilled_at_once(lanes, config.samples_per_prompt)
    return -(-rows // R), 1, -(-T * R // lanes)


def _prefilled_at_once(lanes: int, samples_per_prompt: int) -> int:
    """Rows for a quarter of the lanes, and of whole prompts."""
    return -(-lanes // (4 * samples_per_prompt)) * samples_per_prompt


class _Drawn(NamedTuple):
    """One token of each of M rows; of rows that do not run, padding and zeros."""

    token: Int[Array, " M"]
    logp: Float[Array, " M"]
    value: Float[Array, " M"]
    goes_on: Bool[Array, " M"]  # was running, and this is no EOS


def generate(
    model: "CausalLM",
    prompts: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    key: Array,
    temperature: Float[Array, ""] | float = 1.0,
    *,
    config: SamplingConfig,
) -> Generation:
    """Samples G responses to each prompt, in B = N G rows, a prompt's together; stops early when all have ended.

    Args:
      model: a decoder; adapters and value head are used if it has them.
      prompts: token ids, padded on the left, at least one real token a row.
      prompt_mask: True on real tokens.
      key: random key; the same key gives the same responses.
      temperature: divides the logits; traced, so changing it compiles nothing.
      config: static settings; `config.decode_batch_size` bounds the memory of the cache and the work of a step, and
        `config.samples_per_prompt` is G.

    No gradient flows: wrap nothing around this. Activations and cache have the compute dtype of the model.
    """
    draw = partial(_draw, model, temperature=temperature, config=config)
    G, lanes = config.samples_per_prompt, config.decode_batch_size
    sample_all = _all_at_once if lanes is None or lanes >= len(prompts) * G else _continuously
    tokens, mask_t, logp_t, v_t = sample_all(model, prompts, prompt_mask, key, draw, config)
    eos = jnp.asarray(config.eos_ids, jnp.int32)
    prompts, prompt_mask = (jnp.repeat(x, G, axis=0) for x in (prompts, prompt_mask))
    return Generation(
        tokens=jnp.concatenate([prompts, tokens], axis=1),
        attention_mask=jnp.concatenate([prompt_mask, mask_t], axis=1),
        mask_t=mask_t,
        ended=(mask_t & (tokens[..., None] == eos[None, None]).any(axis=-1)).any(axis=1),
        logp_t=logp_t,
        v_t=v_t,
    )


def _draw(
    model: "CausalLM",
    hidden: Float[Array, "M D"],
    running: Bool[Array, " M"],
    key: Array,
    *,
    temperature: Float[Array, ""] | float,
    config: SamplingConfig,
) -> _Drawn:
    """The next token of each row from the hidden states before it."""
    token, logp = sample(
        model.logits(hidden),
        key,
        temperature=temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        greedy=config.greedy,
    )
    value = model.value(hidden) if model.has_value_head else jnp.zeros(token.shape)
    is_eos = (token[:, None] == jnp.asarray(config.eos_ids, jnp.int32)[None]).any(axis=1)
    return _Drawn(
        jnp.where(running, token, config.pad_id),
        jnp.where(running, logp, 0.0),
        jnp.where(running, value, 0.0),
        running & ~is_eos,
    )


class _Responses(NamedTuple):
    """What becomes of B rows."""

    tokens: Int[Array, "B T"]
    mask_t: Bool[Array, "B T"]
    logp_t: Float[Array, "B T"]
    v_t: Float[Array, "B T"]

    @classmethod
    def none_yet(cls, rows: int, config: SamplingConfig) -> "_Responses":
        """Nothing but padding."""
        shape = rows, config.max_new_tokens
        return cls(
            jnp.full(shape, config.pad_id, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape), jnp.zeros(shape)
        )


class _Batch(NamedTuple):
    t: Int[Array, ""]
    key: Array
    cache: "KVCache"
    running: Bool[Array, " B"]
    responses: _Responses


def _all_at_once(model, prompts, prompt_mask, key, draw, config: SamplingConfig) -> _Responses:
    """Every row from its first to its last token, in step."""
    G, T, P = config.samples_per_prompt, config.max_new_tokens, prompts.shape[1]
    B = len(prompts) * G
    layers = model.layers()

    def choose(loop: _Batch, hidden: Float[Array, "B D"]) -> _Batch:
        """Draws token t of the rows that are still running, from the hidden states before it."""
        key, now = jax.random.split(loop.key)
        drawn = draw(hidden, loop.running, now)
        columns = _Responses(drawn.token, loop.running, drawn.logp, drawn.value)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=loop.t, axis=1)
        responses = jax.tree.map(lambda array, column: put(array, column[:, None]), loop.responses, columns)
        return _Batch(loop.t + 1, key, loop.cache, drawn.goes_on, responses)

    def advance(loop: _Batch) -> _Batch:
        token, mask = (jax.lax.dynamic_index_in_dim(x, loop.t - 1, 1, keepdims=False) for x in loop.responses[:2])
        hidden, cache = model.decode(layers, loop.cache, token, mask)
        return choose(loop._replace(cache=cache), hidden)

    last, cache = _prefill(model, prompts, prompt_mask, P + T, config)
    start = _Batch(jnp.zeros((), jnp.int32), key, cache, jnp.ones((B,), bool), _Responses.none_yet(B, config))
    return jax.lax.while_loop(lambda s: (s.t < T) & s.running.any(), advance, choose(start, last)).responses


def _prefill(model, prompts, prompt_mask, slots: int, config: SamplingConfig) -> tuple[Float[Array, "B D"], "KVCache"]:
    """The last hidden state of each prompt and its cache, once for each of its responses."""
    last = slice(-1, None)
    hidden, cache = model.prefill(prompts, prompt_mask, slots, at=last, int8=config.int8_cache)
    return jax.tree.map(lambda x: jnp.repeat(x, config.samples_per_prompt, axis=0), (hidden[:, 0], cache))


class _Lanes(NamedTuple):
    """M lanes of the batch, each with the row that it decodes."""

    cache: "KVCache"
    row: Int[Array, " M"]
    token: Int[Array, " M"]  # the last one drawn
    t: Int[Array, " M"]  # tokens drawn
    running: Bool[Array, " M"]


class _Loop(NamedTuple):
    key: Array
    lanes: _Lanes
    taken: Int[Array, ""]  # rows that have had a lane
    responses: _Responses


def _continuously(model, prompts, prompt_mask, key, draw, config: SamplingConfig) -> _Responses:
    """A few rows at a time: where one ends, the next takes its lane.

    R rows, enough for a quarter of the lanes, are prefilled together and wait, each with its first token, for a lane.
    When none waits and no more than R are running, these go on in R lanes.

    Yu et al., Orca: A Distributed Serving System for Transformer-Based Generative Models, 2022.
    """
    G, T, P = config.samples_per_prompt, config.max_new_tokens, prompts.shape[1]
    B = len(prompts) * G
    M = config.decode_batch_size or B
    R = _prefilled_at_once(M, G)
    layers = model.layers()
    prompts, prompt_mask = (jnp.pad(x, ((0, -B % R // G), (0, 0)), mode="edge") for x in (prompts, prompt_mask))

    def file(responses: _Responses, drawn: _Drawn, row: Int[Array, " N"], t: Int[Array, " N"]) -> _Responses:
        """With what was drawn as token t of its row; rows that are not running have number B, and are dropped."""
        cells = _Responses(drawn.token, row < B, drawn.logp, drawn.value)
        return jax.tree.map(lambda array, x: array.at[row, t].set(x, mode="drop"), responses, cells)

    def advance(loop: _Loop) -> _Loop:
        """One more token in each lane that is running."""
        key, now = jax.random.split(loop.key)
        lanes = loop.lanes
        hidden, cache = model.decode(layers, lanes.cache, lanes.token, lanes.running)
        drawn = draw(hidden, lanes.running, now)
        responses = file(loop.responses, drawn, jnp.where(lanes.running, lanes.row, B), lanes.t)
        after = _Lanes(cache, lanes.row, drawn.token, lanes.t + 1, drawn.goes_on & (lanes.t + 1 < T))
        return loop._replace(key=key, lanes=after, responses=responses)

    def serve(loop: _Loop) -> _Loop:
        """Prefills the next R rows, and decodes until all of them have a lane; after the last, until R are running."""
        key, now = jax.random.split(loop.key)
        first, end = loop.taken, jnp.minimum(loop.taken + R, B)
        tokens, mask = (jax.lax.dynamic_slice_in_dim(x, first // G, R // G) for x in (prompts, prompt_mask))
        hidden, waiting = model.prefill(tokens, mask, P, at=slice(-1, None), int8=config.int8_cache)
        row = first + jnp.arange(R)
        drawn = draw(jnp.repeat(hidden[:, 0], G, axis=0), row < B, now)
        responses = file(loop.responses, drawn, row, jnp.zeros(R, jnp.int32))

        def admit(loop: _Loop) -> _Loop:
            """Gives free lanes to rows that wait."""
            lanes = loop.lanes
            lane = jnp.argsort(lanes.running, stable=True)[:R]
            row = loop.taken + jnp.arange(len(lane))
            taken = ~lanes.running[lane] & (row < end)
            lane, place = jnp.where(taken, lane, M), row - first

            def put(array: Array, x: Array) -> Array:
                return array.at[lane].set(x, mode="drop")

            def put_cells(array: Array, x: Array) -> Array:
                return array.at[lane, :, : x.shape[2]].set(x[place // G], mode="drop")

            cache = dataclasses.replace(
                lanes.cache,
                layers=jax.tree.map(put_cells, lanes.cache.layers, waiting.layers),
                starts=put(lanes.cache.starts, waiting.starts[place // G]),
                ends=put(lanes.cache.ends, waiting.ends[place // G]),
            )
            fresh = row, drawn.token[place], jnp.ones_like(row), drawn.goes_on[place] & (T > 1)
            lanes = _Lanes(cache, *(put(array, x) for array, x in zip(lanes[1:], fresh, strict=True)))
            return loop._replace(lanes=lanes, taken=loop.taken + taken.sum())

        def admit_and_decode(loop: _Loop) -> _Loop:
            loop = admit(loop)
            enough = jnp.where(loop.taken < B, M - 1, R)
            return jax.lax.while_loop(lambda loop: loop.lanes.running.sum() > enough, advance, loop)

        loop = loop._replace(key=key, responses=responses)
        return jax.lax.while_loop(lambda loop: loop.taken < end, admit_and_decode, loop)

    one_lane_each = jnp.zeros((M, P), jnp.int32), jnp.ones((M, P), bool)
    _, cache = jax.eval_shape(lambda: model.prefill(*one_lane_each, P + T, int8=config.int8_cache))
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    zeros = jnp.zeros(M, jnp.int32)
    lanes = _Lanes(cache, zeros, zeros, zeros, jnp.zeros(M, bool))
    loop = _Loop(key, lanes, jnp.zeros((), jnp.int32), _Responses.none_yet(B, config))
    loop = jax.lax.while_loop(lambda loop: loop.taken < B, serve, loop)
    last = jnp.argsort(~loop.lanes.running, stable=True)[:R]
    loop = loop._replace(lanes=jax.tree.map(lambda x: x[last], loop.lanes))
    return jax.lax.while_loop(lambda loop: loop.lanes.running.any(), advance, loop).responses

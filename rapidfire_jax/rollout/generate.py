"""Sampling whole responses as one program: prefill, then a `while_loop` over a key/value cache."""

import dataclasses
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


class Generation(NamedTuple):
    """Responses and what the policy thought of them while it sampled."""

    tokens: Int[Array, "B S"]  # left-padded prompt, then T response tokens
    attention_mask: Bool[Array, "B S"]
    mask_t: Bool[Array, "B T"]  # True on response tokens up to and including EOS
    ended: Bool[Array, " B"]  # the response has an EOS
    logp_t: Float[Array, "B T"]  # nats at the given temperature, of the whole distribution; 0 after EOS
    v_t: Float[Array, "B T"]  # critic's values; 0 after EOS and for a model without value head


class _Loop(NamedTuple):
    t: Int[Array, ""]
    key: Array
    cache: "KVCache"
    running: Bool[Array, " B"]
    tokens: Int[Array, "B T"]
    mask_t: Bool[Array, "B T"]
    logp_t: Float[Array, "B T"]
    v_t: Float[Array, "B T"]


def generate(
    model: "CausalLM",
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: Array,
    temperature: Float[Array, ""] | float = 1.0,
    *,
    config: SamplingConfig,
) -> Generation:
    """Samples a response to each prompt; stops early when every row has ended.

    Args:
      model: a decoder; adapters and value head are used if it has them.
      prompts: token ids, padded on the left, at least one real token a row.
      prompt_mask: True on real tokens.
      key: random key; the same key gives the same responses.
      temperature: divides the logits; traced, so changing it compiles nothing.
      config: static settings.

    No gradient flows: wrap nothing around this. Activations and cache have the compute dtype of the model.
    """
    B, P = prompts.shape
    T = config.max_new_tokens
    layers = model.layers()
    eos = jnp.asarray(config.eos_ids, jnp.int32)
    lengths = prompt_mask.sum(axis=1, dtype=jnp.int32)

    def choose(loop: _Loop, hidden: Float[Array, "B D"]) -> _Loop:
        """Draws token t of the rows that are still running, from the hidden states before it."""
        key, now = jax.random.split(loop.key)
        token, logp = sample(
            model.logits(hidden),
            now,
            temperature=temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            greedy=config.greedy,
        )
        token = jnp.where(loop.running, token, config.pad_id)
        value = model.value(hidden) if model.has_value_head else jnp.zeros((B,))

        def put(array, column):
            return jax.lax.dynamic_update_slice_in_dim(array, column[:, None], loop.t, axis=1)

        return loop._replace(
            t=loop.t + 1,
            key=key,
            running=loop.running & ~(token[:, None] == eos[None]).any(axis=1),
            tokens=put(loop.tokens, token),
            mask_t=put(loop.mask_t, loop.running),
            logp_t=put(loop.logp_t, jnp.where(loop.running, logp, 0.0)),
            v_t=put(loop.v_t, jnp.where(loop.running, value, 0.0)),
        )

    def advance(loop: _Loop) -> _Loop:
        token, mask = (
            jax.lax.dynamic_index_in_dim(x, loop.t - 1, 1, keepdims=False) for x in (loop.tokens, loop.mask_t)
        )
        hidden, cache = model.decode(layers, loop.cache, token, mask, lengths + loop.t - 1)
        return choose(loop._replace(cache=cache), hidden)

    hidden, cache = model.prefill(prompts, prompt_mask, P + T, int8=config.int8_cache)
    start = _Loop(
        t=jnp.zeros((), jnp.int32),
        key=key,
        cache=cache,
        running=jnp.ones((B,), bool),
        tokens=jnp.full((B, T), config.pad_id, jnp.int32),
        mask_t=jnp.zeros((B, T), bool),
        logp_t=jnp.zeros((B, T), jnp.float32),
        v_t=jnp.zeros((B, T), jnp.float32),
    )
    end = jax.lax.while_loop(lambda s: (s.t < T) & s.running.any(), advance, choose(start, hidden[:, -1]))
    return Generation(
        tokens=jnp.concatenate([prompts, end.tokens], axis=1),
        attention_mask=jnp.concatenate([prompt_mask, end.mask_t], axis=1),
        mask_t=end.mask_t,
        ended=~end.running,
        logp_t=end.logp_t,
        v_t=end.v_t,
    )

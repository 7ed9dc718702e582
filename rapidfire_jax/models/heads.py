"""Heads on the decoder: next-token logits with an optional critic, and a scalar for reward models and critics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rapidfire_jax.models.decoder import Decoder, Mask
from rapidfire_jax.models.lora import merge_lora
from rapidfire_jax.models.quantization import Table, dense_table, logits_of
from rapidfire_jax.models.remat import Remat
from rapidfire_jax.models.weights import assemble, parameters


class ValueParam(nnx.Param):
    """Weights of a head that returns one number."""


class ValueHead(NamedTuple):
    """Arrays of a linear critic."""

    kernel: Float[Array, " D"]
    bias: Float[Array, ""] | None  # None for the head of a `RewardModel`


class CausalLM(Decoder):
    """A decoder with its language-model head and, after `add_value_head`, a critic on the same trunk."""

    def init_head(self, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Draws the rows of the head, unless the embedding serves as head too."""
        if not self.config.tie_embeddings:
            init = jax.nn.initializers.normal(0.02)
            self.lm_head = nnx.Param(init(rngs.params(), (self.config.vocab_size, self.config.hidden_size), dtype))
        self.has_value_head = False

    def add_value_head(self, weights: ValueHead | None = None) -> None:
        """Adds a linear critic, by default of zeros: every value is 0 until it has been trained."""
        kernel, bias = weights or (jnp.zeros((self.config.hidden_size,), jnp.float32), jnp.zeros((), jnp.float32))
        self.value_kernel, self.value_bias = ValueParam(kernel), ValueParam(bias)
        self.has_value_head = True

    def remove_value_head(self) -> ValueHead | None:
        """Takes the critic off again, if there is one."""
        if not self.has_value_head:
            return None
        weights = ValueHead(self.value_kernel[...], self.value_bias[...])
        del self.value_kernel, self.value_bias
        self.has_value_head = False
        return weights

    @property
    def head(self) -> Float[Array, "V D"]:
        """Rows of the language-model head, in the compute dtype; the embedding itself where they are tied."""
        return dense_table(self._table, self.compute_dtype)

    @property
    def _table(self) -> Table:
        return (self.embedding if self.config.tie_embeddings else self.lm_head).get_value()

    def logits(self, hidden: Float[Array, "*M D"]) -> Float[Array, "*M V"]:
        """Logits of hidden states: accumulated and soft-capped in float32, then in the output dtype."""
        logits = logits_of(hidden, self._table)
        if (cap := self.config.logit_soft_cap) is not None:
            logits = jnp.tanh(logits / cap) * cap
        return logits.astype(self.precision.output)

    def value(self, hidden: Float[Array, "*M D"]) -> Float[Array, "*M"]:
        """Critic's estimate from hidden states, float32."""
        return hidden.astype(jnp.float32) @ self.value_kernel[...] + self.value_bias[...]

    def __call__(
        self, tokens: Int[Array, "B S"], mask: Mask | None = None, positions: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        """Logits of every position."""
        return self.logits(self.hidden(tokens, mask, positions))


class RewardModel(Decoder):
    """A decoder with a scalar head: a reward model (one number a sequence) or a critic (one a token).

    The head has no bias, as in Hugging Face's `...ForSequenceClassification` with one label.
    """

    def init_head(self, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Draws a new scalar head."""
        self.add_value_head(ValueHead(_new_score(rngs.params(), self.config.hidden_size, dtype), None))

    @classmethod
    def from_causal(cls, model: CausalLM, key: Array) -> "RewardModel":
        """The trunk of a language model with a new head: where reward modelling starts from an SFT model."""
        arrays = parameters(merge_lora(model))
        score = _new_score(key, model.config.hidden_size, model.weight_dtype)
        return assemble(cls, model.config, arrays | {"score": score}, model.precision)

    def add_value_head(self, weights: ValueHead | None = None) -> None:
        """Puts the scalar head on, by default one of zeros."""
        self.score = ValueParam(jnp.zeros((self.config.hidden_size,)) if weights is None else weights.kernel)

    def remove_value_head(self) -> ValueHead:
        """Takes the scalar head off; only the trunk can be used then."""
        weights = ValueHead(self.score[...], None)
        del self.score
        return weights

    def value(self, hidden: Float[Array, "*M D"]) -> Float[Array, "*M"]:
        """The head's number for hidden states, float32."""
        return hidden.astype(jnp.float32) @ self.score[...].astype(jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        mask: Mask | None = None,
        positions: Int[Array, "B S"] | None = None,
        *,
        remat: Remat | None = None,
    ) -> Float[Array, " B"]:
        """Reward of each row, float32: the head at the row's last real token, wherever padding stands."""
        real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        last = tokens.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
        return self.value(self.hidden(tokens, mask, positions, at=last[:, None], remat=remat)[:, 0])


def _new_score(key: Array, width: int, dtype: DTypeLike) -> Float[Array, " D"]:
    """N(0, 1 / (D + 1)), as Stiennon et al. 2020 start a reward model (appendix B.2)."""
    return jax.random.normal(key, (width,), dtype) * jnp.asarray((width + 1) ** -0.5, dtype)

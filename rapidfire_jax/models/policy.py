"""A policy with its critic and its reference as pure functions of two parameter trees.

`frozen` holds the weights the run started from, and so is the reference policy. `trainable` holds what is optimised:
adapters and value head with LoRA, otherwise a full copy of the weights and the value head.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import linear_logprob
from rapidfire_jax.models.decoder import CausalLM, ValueParam
from rapidfire_jax.models.lora import add_lora

type Params = Any  # a pytree of arrays


class TokenOutputs(NamedTuple):
    """What a forward pass says of the response tokens, float32."""

    logp_t: Float[Array, "B T"]  # nats
    entropy_t: Float[Array, "B T"]  # nats
    v_t: Float[Array, "B T"]  # critic, from the state before token t


class Inputs(NamedTuple):
    """Sequences as a policy wants them."""

    tokens: Int[Array, "B S"]
    attention_mask: Bool[Array, "B S"]
    lower: (
        Float[Array, "B S D"] | None
    )  # residual stream above the last layer that nothing trains; None: all are trained


@dataclasses.dataclass(frozen=True)
class Policy:
    """The static half of a model; hashable, so that it can be a static argument of jit."""

    graphdef: Any
    reference_graphdef: Any
    full: bool  # every weight is trained, not adapters
    remat: bool = False

    def merge(self, frozen: Params, trainable: Params) -> CausalLM:
        """The model of the trained policy."""
        return nnx.merge(self.graphdef, trainable) if self.full else nnx.merge(self.graphdef, frozen, trainable)

    def encode(self, frozen: Params, tokens: Int[Array, "B S"], attention_mask: Bool[Array, "B S"]) -> Inputs:
        """The part of a forward pass that training cannot change, once for the policy, the reference and all epochs."""
        if self.full:
            return Inputs(tokens, attention_mask, None)
        return Inputs(tokens, attention_mask, nnx.merge(self.reference_graphdef, frozen).lower(tokens, attention_mask))

    def apply(
        self,
        frozen: Params,
        trainable: Params,
        inputs: Inputs,
        response_length: int,
        temperature: Float[Array, ""] | float,
    ) -> TokenOutputs:
        """Log-probability, entropy and value of the last `response_length` tokens, from one pass through the trunk.

        Gradients flow to `trainable`: from the log-probabilities and entropies through head and trunk, from the values
        through value head and trunk.
        """
        model = self.merge(frozen, trainable)
        hidden = _before_response(model, inputs, response_length, self.remat)
        targets = inputs.tokens[:, -response_length:]
        logp_t, entropy_t = linear_logprob(hidden, model.head, targets, temperature=temperature)
        return TokenOutputs(logp_t, entropy_t, model.value(hidden))

    def reference(
        self, frozen: Params, inputs: Inputs, response_length: int, temperature: Float[Array, ""] | float
    ) -> Float[Array, "B T"]:
        """Log-probability of the last `response_length` tokens under the policy the run started from."""
        model = nnx.merge(self.reference_graphdef, frozen)
        hidden = _before_response(model, inputs, response_length, remat=False)
        return linear_logprob(hidden, model.head, inputs.tokens[:, -response_length:], temperature=temperature).logp


def make_policy(
    model: CausalLM, key: Array, *, lora: dict[str, Any] | None, remat: bool = False
) -> tuple[Policy, Params, Params]:
    """Splits a loaded model, once, into `(policy, frozen, trainable)`. The model gains the adapters and a value head.

    Args:
      model: as loaded, without adapters.
      key: initialises the adapters.
      lora: `rank`, `alpha`, `targets` and `layers` of `add_lora`, or None to train every weight.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """
    if lora is not None and lora.get("layers") is not None:
        model.split_blocks(lora["layers"])
    reference_graphdef, frozen = nnx.split(model)
    if lora is not None:
        add_lora(model, **lora, key=key)
    model.add_value_head()
    if lora is None:
        graphdef, trainable = nnx.split(model)
        trainable = jax.tree.map(jnp.copy, trainable)
    else:
        graphdef, trainable, *_ = nnx.split(model, nnx.Any(nnx.LoRAParam, ValueParam), ...)
    return Policy(graphdef, reference_graphdef, full=lora is None, remat=remat), frozen, trainable


def _before_response(model: CausalLM, inputs: Inputs, response_length: int, remat: bool) -> Float[Array, "B T D"]:
    """Hidden states from which the response tokens were predicted: one position earlier than the tokens."""
    tokens, mask, lower = inputs
    x = model.lower(tokens, mask) if lower is None else lower
    return model.upper(x, mask, remat=remat)[:, -response_length - 1 : -1]

"""A policy with its critic and its reference as pure functions of two parameter trees.

`frozen` holds the weights the run started from, and so is the reference policy. `trainable` holds what is optimised:
adapters and value head with LoRA, otherwise a full copy of the weights and the value head. Both are `Parts`: the
policy's, and those of a critic that is a model of its own.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import linear_logprob
from rapidfire_jax.errors import InputError
from rapidfire_jax.models.decoder import Decoder
from rapidfire_jax.models.heads import CausalLM, RewardModel, ValueParam
from rapidfire_jax.models.lora import add_lora
from rapidfire_jax.models.quantization import is_quantized
from rapidfire_jax.models.remat import PRODUCTS, Remat

type Params = Any  # a pytree of arrays

VALUE_HEAD = ("value_kernel", "value_bias")


class Parts(NamedTuple):
    """Parameters of the policy and of a separate critic; None: the critic is a head on the policy's trunk."""

    policy: Params
    critic: Params | None = None


NOTHING = Parts(None)


class TokenOutputs(NamedTuple):
    """What a forward pass says of the response tokens, float32."""

    logp_t: Float[Array, "B T"]  # nats
    entropy_t: Float[Array, "B T"]  # nats
    v_t: Float[Array, "B T"] | None  # critic, from the state before token t; None without one
    next_v: Float[Array, " B"] | None  # critic, from the state after the last token


class Inputs(NamedTuple):
    """Sequences as a policy wants them."""

    tokens: Int[Array, "B S"]
    attention_mask: Bool[Array, "B S"]
    lower: Parts  # residual streams [B, S, D] above the last layer that nothing trains; None: all are trained


@dataclasses.dataclass(frozen=True)
class Policy:
    """The static half of a model; hashable, so that it can be a static argument of jit."""

    graphdefs: Parts
    reference_graphdefs: Parts  # without adapters and value head
    full: bool  # every weight is trained, not adapters
    remat: Parts = NOTHING  # what each one's backward pass computes again, a `Remat`; None: nothing

    def merge(self, frozen: Parts, trainable: Parts) -> CausalLM:
        """The model of the trained policy."""
        return self._merge(self.graphdefs.policy, frozen.policy, trainable.policy)

    def merge_critic(self, frozen: Parts, trainable: Parts) -> RewardModel | None:
        """The model of the trained critic, if it is separate."""
        if self.graphdefs.critic is None:
            return None
        return self._merge(self.graphdefs.critic, frozen.critic, trainable.critic)

    def encode(self, frozen: Parts, tokens: Int[Array, "B S"], attention_mask: Bool[Array, "B S"]) -> Inputs:
        """The part of a forward pass that training cannot change, once for the policy, the reference and all epochs."""
        lower = Parts(None)
        if not self.full:
            lower = Parts(
                *(
                    None if graphdef is None else nnx.merge(graphdef, weights).lower(tokens, attention_mask)
                    for graphdef, weights in zip(self.reference_graphdefs, frozen, strict=True)
                )
            )
        return Inputs(tokens, attention_mask, lower)

    def apply(
        self,
        frozen: Parts,
        trainable: Parts,
        inputs: Inputs,
        response_length: int,
        temperature: Float[Array, ""] | float,
    ) -> TokenOutputs:
        """Log-probability, entropy and value of the last `response_length` tokens, from one pass through each trunk.

        Gradients flow to `trainable`: from the log-probabilities and entropies through head and trunk, from the values
        through value head and trunk.
        """
        model, critic = self.merge(frozen, trainable), self.merge_critic(frozen, trainable)
        hidden = _around_response(model, inputs, inputs.lower.policy, response_length, self.remat.policy)
        logp_t, entropy_t = _log_probs(model, hidden[:, :-1], inputs, temperature)
        if critic is not None:
            hidden = _around_response(critic, inputs, inputs.lower.critic, response_length, self.remat.critic)
            values = critic.value(hidden)
        elif model.has_value_head:
            values = model.value(hidden)
        else:
            return TokenOutputs(logp_t, entropy_t, None, None)
        return TokenOutputs(logp_t, entropy_t, values[:, :-1], values[:, -1])

    def reference(
        self, frozen: Parts, inputs: Inputs, response_length: int, temperature: Float[Array, ""] | float
    ) -> Float[Array, "B T"]:
        """Log-probability of the last `response_length` tokens under the policy the run started from."""
        model = nnx.merge(self.reference_graphdefs.policy, frozen.policy)
        hidden = _around_response(model, inputs, inputs.lower.policy, response_length, remat=None)
        return _log_probs(model, hidden[:, :-1], inputs, temperature)[0]

    def is_critic(self, trainable: Parts) -> Parts:
        """For each trainable array, whether it is the critic's alone: a separate critic's, or the value head's."""
        of_policy = jax.tree.map_with_path(
            lambda path, _: jax.tree_util.keystr(path[:1], simple=True) in VALUE_HEAD, trainable.policy
        )
        return Parts(of_policy, jax.tree.map(lambda _: True, trainable.critic))

    def _merge(self, graphdef: Any, frozen: Params, trainable: Params) -> Any:
        return nnx.merge(graphdef, trainable) if self.full else nnx.merge(graphdef, frozen, trainable)


def make_policy(
    model: CausalLM,
    key: Array,
    *,
    lora: dict[str, Any] | None,
    critic: RewardModel | None = None,
    value_head: bool = True,
    remat: Remat | None = PRODUCTS,
) -> tuple[Policy, Parts, Parts]:
    """Splits a loaded model, once, into `(policy, frozen, trainable)`. The model gains adapters and a value head.

    Args:
      model: as loaded, without adapters; a value head that it brings is trained on.
      key: initialises the adapters.
      lora: arguments of `add_lora` but its key, or None to train every weight.
      critic: a model of its own, of any size but with the same vocabulary, trained like the policy; None: a value head
        on the policy's trunk.
      value_head: False leaves out the value head that stands in for a separate critic.
      remat: what the backward passes of policy and critic keep; None: everything.
    """
    if critic is None:
        parts = [Parts(part) for part in split_parameters(model, lora, key, value_head=value_head)]
    else:
        of_policy = split_parameters(model, lora, key, value_head=False)
        of_critic = split_parameters(critic, lora, jax.random.fold_in(key, 1), value_head=True)
        parts = [Parts(*pair) for pair in zip(of_policy, of_critic, strict=True)]
    graphdefs, reference_graphdefs, frozen, trainable = parts
    return Policy(graphdefs, reference_graphdefs, full=lora is None, remat=Parts(remat, remat)), frozen, trainable


def split_parameters(
    model: CausalLM | RewardModel, lora: dict[str, Any] | None, key: Array, *, value_head: bool
) -> tuple[Any, Any, Params, Params]:
    """Graph definitions with and without what is added for training, frozen and trainable parameters.

    Raises:
      InputError: quantised weights that should be trained.
    """
    if lora is None and is_quantized(nnx.state(model)):
        raise InputError("quantised weights are frozen; train adapters (adapter.type: lora), or load 16 bits")
    if lora is None:
        model.split_blocks(1)  # less is asked of the last layer: cut out of a stack, trained weights would be copied
    elif lora.get("layers") is not None:
        if isinstance(model, RewardModel):
            lora = lora | {"layers": min(lora["layers"], model.config.num_layers)}
        model.split_blocks(lora["layers"])
    head = model.remove_value_head()
    reference_graphdef, frozen = nnx.split(model)
    if lora is not None:
        add_lora(model, **lora, key=key)
    if value_head:
        model.add_value_head(head)
    if lora is None:
        graphdef, trainable = nnx.split(model)
        trainable = jax.tree.map(jnp.copy, trainable)
    else:
        graphdef, trainable, *_ = nnx.split(model, nnx.Any(nnx.LoRAParam, ValueParam), ...)
    return graphdef, reference_graphdef, frozen, trainable


def _around_response(
    model: Decoder, inputs: Inputs, lower: Float[Array, "B S D"] | None, response_length: int, remat: Remat | None
) -> Float[Array, "B T+1 D"]:
    """Hidden states from which the response tokens were predicted, one position earlier, and that of the last one."""
    tokens, mask, _ = inputs
    at = slice(-response_length - 1, None) if response_length + 1 < tokens.shape[1] else None
    if lower is None:
        return model.hidden(tokens, mask, at=at, remat=remat)
    return model.upper(lower, mask, at=at, remat=remat)


def _log_probs(
    model: CausalLM, hidden: Float[Array, "B T D"], inputs: Inputs, temperature: Float[Array, ""] | float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability and entropy of the response tokens from the hidden states before them."""
    targets = inputs.tokens[:, -hidden.shape[1] :]
    found = linear_logprob(hidden, model.head, targets, temperature=temperature, soft_cap=model.config.logit_soft_cap)
    return found.logp, found.entropy

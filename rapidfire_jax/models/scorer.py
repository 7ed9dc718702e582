"""A reward model in training as a pure function of two parameter trees."""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rapidfire_jax.models.heads import RewardModel
from rapidfire_jax.models.policy import Params, split_parameters
from rapidfire_jax.models.remat import PRODUCTS, Remat


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The static half of a reward model; hashable, so that it can be a static argument of jit."""

    graphdef: Any
    full: bool  # every weight is trained, not adapters and head
    remat: Remat | None = None

    def merge(self, frozen: Params, trainable: Params) -> RewardModel:
        """The model."""
        return nnx.merge(self.graphdef, trainable) if self.full else nnx.merge(self.graphdef, frozen, trainable)

    def apply(
        self, frozen: Params, trainable: Params, tokens: Int[Array, "B S"], attention_mask: Bool[Array, "B S"]
    ) -> Float[Array, " B"]:
        """Score of each row at its last real token, float32; gradients flow to `trainable`."""
        return self.merge(frozen, trainable)(tokens, attention_mask, remat=self.remat)


def make_scorer(
    model: RewardModel, key: Array, *, lora: dict[str, Any] | None, remat: Remat | None = PRODUCTS
) -> tuple[Scorer, Params, Params]:
    """Splits a reward model, once, into `(scorer, frozen, trainable)`. The model gains adapters.

    Args:
      model: as loaded or made by `RewardModel.from_causal`.
      key: initialises the adapters.
      lora: arguments of `add_lora` but its key, or None to train every weight. The head is always trained.
      remat: what the backward pass keeps; None: everything.
    """
    graphdef, _, frozen, trainable = split_parameters(model, lora, key, value_head=True)
    return Scorer(graphdef, full=lora is None, remat=remat), None if lora is None else frozen, trainable

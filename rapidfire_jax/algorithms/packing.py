"""Several rollouts a row in scoring and learning, so that little of a pass is padding.

Trunk, head and losses then see R rows instead of B, of the same width S. Whatever a pass says of token s > 0 of a row
stands at s - 1 of an array [R, S - 1]; a rollout's own arrays [B, T] are spread over such rows, and gathered from them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Where in R rows the tokens of B rollouts `[B, S]` stand; `pack_rollouts` makes it."""

    source: Int[Array, "R S"]  # which of the B x S tokens; B x S at padding
    segments: Int[Array, "R S"]  # number of the rollout in its row, from 1; 0 at padding

    def tokens(self, tokens: Int[Array, "B S"]) -> Int[Array, "R S"]:
        """Token ids in rows, 0 at padding."""
        return _take(tokens, self.source)

    def spread(self, of_tokens: Array) -> Array:
        """What belongs to response tokens, `[B, T]`, in rows `[R, S - 1]`; 0 or False elsewhere."""
        S = self.source.shape[1]
        whole = jnp.pad(of_tokens, ((0, 0), (S - of_tokens.shape[1], 0)))
        return _take(whole, self.source)[:, 1:]

    def batch(self, batch: Any) -> Any:
        """A minibatch of rows from one of rollouts, whose `inputs` are in rows already."""
        names = [field.name for field in dataclasses.fields(batch) if field.name != "inputs"]
        return dataclasses.replace(batch, **jax.tree.map(self.spread, {name: getattr(batch, name) for name in names}))

    def gather(self, of_rows: Float[Array, "R S-1"], mask_t: Bool[Array, "B T"]) -> Float[Array, "B T"]:
        """The inverse of `spread`: 0 where `mask_t` is False."""
        return self._at(jnp.pad(of_rows, ((0, 0), (1, 0))), mask_t)

    def gather_next(
        self, v_t: Float[Array, "R S-1"], next_v: Float[Array, " R"], mask_t: Bool[Array, "B T"]
    ) -> Float[Array, " B"]:
        """Values of the states after the last token of each rollout, from those before and after the tokens of rows."""
        after = self._at(jnp.concatenate([v_t, next_v[:, None]], axis=1), mask_t)
        last = mask_t & ~jnp.pad(mask_t, ((0, 0), (0, 1)))[:, 1:]
        return jnp.where(last, after, 0.0).sum(axis=1)

    def _at(self, of_rows: Array, mask_t: Bool[Array, "B T"]) -> Array:
        """What stands in rows `[R, S]` where the response tokens do."""
        (B, T), S = mask_t.shape, self.source.shape[1]
        places = jnp.arange(self.source.size, dtype=jnp.int32)
        place = jnp.full(B * S, self.source.size, jnp.int32).at[self.source.reshape(-1)].set(places, mode="drop")
        return jnp.where(mask_t, _take(of_rows, place.reshape(B, S)[:, S - T :]), 0)


def objection(config: Any) -> str | None:
    """What in the settings of an algorithm has to see whole rollouts, which rows of several do not show, or nothing."""
    for name in ("aggregation", "ratio_level"):
        if config.packing and (found := getattr(config, name, "token")) != "token":
            return f"packing=true needs {name}=token; found {found}"
    return None


def _take(of_tokens: Array, numbers: Int[Array, "M S"]) -> Array:
    return of_tokens.reshape(-1).at[numbers].get(mode="fill", fill_value=0)

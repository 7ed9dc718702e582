"""Dynamic loss scaling: what lets gradients pass through float16, whose smallest number is 6e-8."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rapidfire_jax.algorithms.masking import Metrics

SMALLEST, LARGEST = 1.0, 2.0**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """The loss is multiplied by `scale` before its gradient is taken, and the gradient divided by it, in float32.

    A step whose loss or gradient is not finite is not taken, and halves the scale, down to 1 at least;
    `growth_interval` steps in a row that are taken double it, up to 2^24.

    References: Micikevicius et al., Mixed Precision Training, 2018, sec. 3.2.
    """

    scale: Float[Array, ""]  # float32, a power of 2
    in_a_row: Int[Array, ""]  # steps taken since the scale changed, or one was skipped
    skipped: Int[Array, ""]  # steps, in the whole run
    growth_interval: int = dataclasses.field(default=2000, metadata={"static": True})

    def after(self, finite: Bool[Array, ""]) -> "LossScale":
        """The scale for the step after one that was taken, if `finite`, or skipped."""
        in_a_row = jnp.where(finite, self.in_a_row + 1, 0)
        grows = in_a_row == self.growth_interval
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return dataclasses.replace(
            self,
            scale=jnp.clip(self.scale * factor, SMALLEST, LARGEST),
            in_a_row=jnp.where(grows, 0, in_a_row),
            skipped=self.skipped + (~finite).astype(jnp.int32),
        )


def init_loss_scale(scale: float = 2.0**15, growth_interval: int = 2000) -> LossScale:
    """The scale of a first step."""
    in_a_row, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))  # two arrays, so that both can be donated
    return LossScale(jnp.asarray(scale, jnp.float32), in_a_row, skipped, growth_interval)


def all_finite(*arrays: Array) -> Bool[Array, ""]:
    """Whether no array holds an infinity or NaN."""
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


def over_steps(metrics: Metrics, taken: Bool[Array, " N"]) -> Metrics:
    """One number a metric from those of N float16 steps, of which the first ones were `taken` or skipped.

    The mean of those that are finite, NaN if none is; loss scale and number of skipped steps of the last step.
    """
    means = {}
    for name, values in metrics.items():
        counts = taken & jnp.isfinite(values)
        means[name] = jnp.where(counts, values, 0.0).sum() / counts.sum(dtype=values.dtype)
    last = jnp.maximum(taken.sum() - 1, 0)
    return means | {name: metrics[name][last] for name in metrics if name.startswith("precision/")}

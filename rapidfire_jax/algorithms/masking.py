"""Sums, means and whitening over the positions where a mask is True, and how token losses become one number."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

type Aggregation = Literal["token", "sequence", "fixed"]


class Mean(NamedTuple):
    """A mean that is not divided yet: parts of a batch are added up first."""

    total: Float[Array, ""]
    weight: Float[Array, ""]  # what `total` is to be divided by


class Peak(NamedTuple):
    """The largest value of a batch; of several parts, the largest of theirs."""

    value: Float[Array, ""]


type Metrics = dict[str, Array]
type PartialMetrics = dict[str, Mean | Peak]


def wide(*dtypes: DTypeLike) -> DTypeLike:
    """The dtype to compute in: float32, or float64 if one of `dtypes` is."""
    return jnp.float64 if any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32


def finish(parts: PartialMetrics) -> Metrics:
    """Numbers from partial metrics, each of them stacked `[N]` over the parts of a batch or of one part alone."""
    return {
        name: part.value.max() if isinstance(part, Peak) else part.total.sum() / jnp.maximum(part.weight.sum(), 1.0)
        for name, part in parts.items()
    }


def masked_sum(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(sum, count)` of `x` where `mask`; what stands elsewhere, NaN included, has no effect."""
    return jnp.where(mask, x, 0.0).sum(), mask.sum(dtype=x.dtype)


def masked_mean(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, ""]:
    """Mean of `x` where `mask`; 0 where the mask is empty."""
    total, count = masked_sum(x, mask)
    return total / jnp.maximum(count, 1.0)


def centred(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, "*S"]:
    """`x` less its mean where `mask`, 0 elsewhere; twice, as the rounded mean of equal numbers is not that number."""
    for _ in range(2):
        x = jnp.where(mask, x - masked_mean(x, mask), 0.0)
    return x


def masked_variance(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, ""]:
    """Unbiased variance of `x` where `mask`; 0 for fewer than two positions."""
    return jnp.sum(centred(x, mask) ** 2) / jnp.maximum(mask.sum(dtype=x.dtype) - 1.0, 1.0)


def whiten(x: Float[Array, "*S"], mask: Bool[Array, "*S"], *, keep_mean: bool = False) -> Float[Array, "*S"]:
    """Scales `x` to variance 1 over `mask` and shifts it to mean 0, unless `keep_mean`; 0 elsewhere."""
    scaled = centred(x, mask) * jax.lax.rsqrt(masked_variance(x, mask) + 1e-8)
    return jnp.where(mask, scaled + masked_mean(x, mask), 0.0) if keep_mean else scaled


def aggregate(
    x_t: Float[Array, "B T"], mask_t: Bool[Array, "B T"], how: Aggregation
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Token losses as `(sum, count)`; sums and counts of several parts of a batch are added before they are divided.

        token      sum of all tokens / number of tokens                        every token counts alike (DAPO)
        sequence   mean over the sequences of the mean over their tokens       every sequence counts alike (GRPO)
        fixed      sum of all tokens / (number of sequences x T)               lengths have no part in it (Dr. GRPO)

    Sequences without any token are not counted.

    References:
      Yu et al., DAPO, 2025, sec. 3.3; Shao et al., DeepSeekMath, 2024, eq. 3; Liu et al., Understanding
      R1-Zero-Like Training, 2025, sec. 3.
    """
    if how == "token":
        return masked_sum(x_t, mask_t)
    lengths = mask_t.sum(axis=1, dtype=x_t.dtype)
    rows = (lengths > 0).sum(dtype=x_t.dtype)
    divisors = jnp.maximum(lengths, 1.0) if how == "sequence" else jnp.full_like(lengths, mask_t.shape[1])
    return (jnp.where(mask_t, x_t, 0.0).sum(axis=1) / divisors).sum(), rows


def last_position(mask_t: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the last masked-in position of each row, and nowhere in a row without any."""
    after = jnp.cumsum(mask_t[:, ::-1], axis=1)[:, ::-1]
    return mask_t & (after == 1)

"""Rotary position embeddings (Su et al. 2021) and the ways of stretching them beyond the context of pre-training."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rapidfire_jax.errors import InputError

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which part of a head is rotated how fast. Static under jit.

    `factor`, the rate of stretching, is read by every type but "default" and "longrope". `original_positions` is the
    context of pre-training.
    """

    theta: float = 10000.0
    fraction: float = 1.0  # of the head width that is rotated
    type: str = "default"
    factor: float = 1.0
    original_positions: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope, one a frequency
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0  # multiplies cosines and sines

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise InputError(f"rope type {self.type!r} is not supported; known: {', '.join(TYPES)}")
        if not (self.theta > 0 and 0 < self.fraction <= 1 and self.factor > 0):
            raise InputError(
                f"rope: theta {self.theta} and factor {self.factor} must be positive, the rotated fraction "
                f"{self.fraction} in (0, 1]"
            )
        if self.type not in ("default", "linear") and not self.original_positions:
            raise InputError(f"rope type {self.type!r} needs original_max_position_embeddings")

    def rotated(self, head_dim: int) -> int:
        """Entries of a head that are rotated; of an odd number, one more is."""
        return int(head_dim * self.fraction)


def rotations(
    rope: Rope, positions: Int[Array, "B S"], head_dim: int
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """Cosine and sine of every angle `position * frequency`, float32.

    "dynamic" and "longrope" choose the frequencies of a sequence by its length, which is where `positions` stop rising.
    """
    angles = positions[..., None].astype(jnp.float32) * _frequencies(rope, positions, rope.rotated(head_dim))
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "B S heads H"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]
) -> Float[Array, "B S heads H"]:
    """Rotates the halves of the first `2 half` entries of a head against one another; the rest passes."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    low, high = jnp.split(rotated, 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def _frequencies(rope: Rope, positions: Int[Array, "B S"], dim: int) -> Float[Array, "B S half"]:
    """Radians a position, of one token for all where they do not depend on the length of its sequence."""
    exponents = np.arange(0, dim, 2) / dim
    inverse = rope.theta**-exponents
    original = rope.original_positions or 0
    if rope.type == "dynamic":
        # NTK-aware: the base grows with the sequence, so that the slowest frequency spans it.
        length = jnp.maximum(_lengths(positions), original).astype(jnp.float32)
        stretched = rope.factor * length / original - (rope.factor - 1)
        base = rope.theta * stretched ** (dim / (dim - 2))
        return base[..., None] ** jnp.asarray(-exponents, jnp.float32)[None, None]
    if rope.type == "longrope":
        short, long = (jnp.asarray(inverse / np.array(f), jnp.float32) for f in (rope.short_factors, rope.long_factors))
        return jnp.where((_lengths(positions) > original)[..., None], long[None, None], short[None, None])
    if rope.type == "linear":
        inverse = inverse / rope.factor
    elif rope.type == "llama3":
        inverse = inverse / llama3_factors(rope, dim)
    elif rope.type == "yarn":
        inverse = _yarn(rope, inverse, original)
    return jnp.asarray(inverse, jnp.float32)[None, None]


def _lengths(positions: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Length of each token's sequence: one more than the next position after which a new sequence begins."""
    S = positions.shape[1]
    ends = jnp.pad(positions[:, 1:] < positions[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(ends, jnp.arange(S)[None], S), axis=1, reverse=True)
    return jnp.take_along_axis(positions, end, axis=1) + 1


def llama3_factors(rope: Rope, dim: int) -> np.ndarray:
    """What "llama3" divides each frequency by: slow ones by `factor`, fast ones by 1, those between by a blend."""
    assert rope.original_positions is not None
    turns = rope.original_positions * rope.theta ** (-np.arange(0, dim, 2) / dim) / (2 * math.pi)
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return 1 / (kept + (1 - kept) / rope.factor)


def _yarn(rope: Rope, inverse: np.ndarray, original: int) -> np.ndarray:
    """NTK by parts (Peng et al. 2023, section 3.2): blended over a range of frequency numbers."""
    half = len(inverse)

    def number(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = number(rope.beta_fast), number(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    stretched = np.clip((np.arange(half) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return inverse * (1 - stretched + stretched / rope.factor)

"""Kernel of `ppo_loss`: a warpgroup reads a tile of tokens once and leaves its sums and, when asked, the gradients.

Every term is a function of one token, so the slopes are known where the terms are. With ratio r and advantage A,

    policy = max(-A r, -A clip(r)):  d policy / d logp = -A r where -A r is the larger, else 0
    value  = max(e^2, e_clipped^2)/2: d value / d v    = e    where e^2 is the larger,  else 0

and the backward pass is the product of a cotangent and what the forward pass wrote. XLA adds up the tiles' sums.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import launch
from pallas_kernels.ppo_loss.reference import Constants, Numbers, PPOLoss, Trained, assemble
from pallas_kernels.ppo_loss.terms import LARGEST_LOG_RATIO
from pallas_kernels.tuning import choice, config_for

VECTOR = 4  # float32 in 16 bytes


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut."""

    tile: int = choice(512, 1024, 2048)  # tokens of a block, all at once in registers


def heuristic(tokens: int) -> Config:
    """Small tiles while there are few tokens, so that every core has some."""
    return Config(tile=512 if tokens < 2**18 else 1024)


def reasons(trained: Trained, constants: Constants, numbers: Numbers, kl_estimator: str) -> list[str]:
    """Why the kernel cannot serve a call."""
    floats = {str(x.dtype) for x in jax.tree.leaves((trained, constants[1:]))}
    found = [f"dtype {dtype}; accepted: float32" for dtype in sorted(floats - {"float32"})]
    if trained.logp.size == 0:
        found.append("there are no tokens")
    return found


def ppo_loss_forward(trained, constants, numbers, kl_estimator, *, gradients):
    """`(PPOLoss, gradient of total to logp or None, to v or None)` of arrays of one shape."""
    shape, tokens = trained.logp.shape, trained.logp.size
    tile = config_for("ppo_loss_forward", heuristic(tokens), tokens=tokens).tile
    blocks = pl.cdiv(tokens, tile)

    def flat(x):
        return jnp.pad(x.reshape(-1), (0, blocks * tile - tokens))

    arrays = trained._asdict() | constants._asdict() | {"mask": constants.mask.astype(jnp.int8)}
    arrays = {name: flat(x) for name, x in arrays.items() if x is not None}
    used = {name: x for name, x in numbers._asdict().items() if x is not None}
    names = ["count", "policy", "entropy", "approx_kl", "clipped", "log_ratio"]
    names += ["value"] * ("v" in arrays) + ["kl"] * ("ref_logp" in arrays)
    layout = plgpu.Layout.WG_STRIDED((tile,), vec_size=VECTOR)

    def body(*refs):
        array_refs, (used_ref, partial_ref, *slope_refs) = refs[: len(arrays)], refs[len(arrays) :]
        block = lax.axis_index("block")
        here = pl.ds(block * tile, tile)
        loaded = {name: plgpu.load(ref.at[here], layout=layout) for name, ref in zip(arrays, array_refs, strict=True)}
        mask = loaded.pop("mask") != 0
        scalars = {name: used_ref[i] for i, name in enumerate(used)}
        terms, deviation, slopes = _terms(mask, loaded, scalars, kl_estimator)
        for i, name in enumerate(names):
            partial_ref[block, i] = jnp.sum(jnp.where(mask, terms[name], 0.0))
        partial_ref[block, len(names)] = jnp.max(deviation)
        for ref, slope in zip(slope_refs, slopes, strict=False):
            ref[here] = jnp.where(mask, slope, 0.0)

    slopes = [jax.ShapeDtypeStruct((blocks * tile,), jnp.float32)] * (gradients * (1 + ("v" in arrays)))
    partial, *slopes = launch.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((blocks, len(names) + 1), jnp.float32), *slopes],
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="ppo_loss_forward",
    )(*arrays.values(), jnp.stack([jnp.asarray(x, jnp.float32) for x in used.values()]))
    sums = dict(zip(names, partial[:, :-1].sum(axis=0), strict=True))
    loss: PPOLoss = assemble(sums, partial[:, -1].max(), numbers)
    d_logp, d_v = (*[slope[:tokens].reshape(shape) for slope in slopes], None, None)[:2]
    return loss, d_logp, d_v


def _terms(mask, x, number, kl_estimator):
    """Terms of every token by name, deviation of its ratio from 1, and slopes of the total to logp and v."""
    difference = jnp.where(mask, x["logp"] - x["old_logp"], 0.0)
    log_ratio = _cut_off(difference)
    ratio = jnp.exp(log_ratio)
    low, high = 1.0 - number["clip_low"], 1.0 + number["clip_high"]
    free = -x["adv"] * ratio
    bounded = -x["adv"] * jnp.minimum(jnp.maximum(ratio, low), high)
    policy, slope = jnp.maximum(free, bounded), jnp.where(free < bounded, 0.0, free)
    if "dual_clip" in number:
        ceiling = jnp.where(x["adv"] < 0.0, -x["adv"] * number["dual_clip"], jnp.inf)
        policy, slope = jnp.minimum(policy, ceiling), jnp.where(policy > ceiling, 0.0, slope)
    if "importance" in x:
        policy, slope = policy * x["importance"], slope * x["importance"]
    slope = jnp.where(log_ratio == difference, slope, 0.0)
    terms = {
        "count": jnp.ones_like(ratio),
        "policy": policy,
        "entropy": x["entropy"],
        "approx_kl": _expm1_less_x(log_ratio, ratio),
        "clipped": jnp.where((ratio < low) | (ratio > high), 1.0, 0.0),
        "log_ratio": jnp.abs(log_ratio),
    }
    slopes = [slope]
    if "ref_logp" in x:
        terms["kl"], kl_slope = _kl(jnp.where(mask, x["logp"] - x["ref_logp"], 0.0), kl_estimator)
        slopes[0] += number["kl_coef"] * kl_slope
    if "v" in x:
        error = x["v"] - x["returns"]
        square, slope = error * error, error
        if "value_clip" in number:
            least, most = x["old_v"] - number["value_clip"], x["old_v"] + number["value_clip"]
            clipped_error = jnp.minimum(jnp.maximum(x["v"], least), most) - x["returns"]
            clipped_square = clipped_error * clipped_error
            square, slope = jnp.maximum(square, clipped_square), jnp.where(square < clipped_square, 0.0, error)
        terms["value"] = 0.5 * square
        slopes.append(number["value_coef"] * slope)
    return terms, jnp.abs(ratio - 1.0), slopes


def _kl(difference, estimator):
    """Estimate and its slope."""
    name = estimator.removesuffix("+")
    if name == "k1":
        value, slope = difference, jnp.ones_like(difference)
    elif name == "k2":
        value, slope = 0.5 * difference * difference, difference
    elif name == "k3":
        log_ratio = _cut_off(-difference)
        ratio = jnp.exp(log_ratio)
        value, slope = _expm1_less_x(log_ratio, ratio), jnp.where(log_ratio == -difference, 1.0 - ratio, 0.0)
    else:
        value, slope = jnp.abs(difference), jnp.sign(difference)
    return value, slope if name == estimator else difference


def _cut_off(log_ratio):
    return jnp.minimum(jnp.maximum(log_ratio, -LARGEST_LOG_RATIO), LARGEST_LOG_RATIO)


def _expm1_less_x(x, exp_x):
    """`exp(x) - 1 - x` without cancellation: a series near 0."""
    series = jnp.full_like(x, 1 / 40320)
    for factor in (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series = series * x + factor
    return jnp.where(jnp.abs(x) < 0.5, series * x * x, exp_x - 1.0 - x)

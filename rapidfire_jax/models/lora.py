"""Low-rank adapters (Hu et al. 2021) on the projections of a `CausalLM`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.decoder import CausalLM
from rapidfire_jax.models.weights import assemble, parameters

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """The projections that `targets` means: "all-linear", one name, or several.

    Raises:
      InputError: no name, or an unknown one.
    """
    if targets == "all-linear":
        return PROJECTIONS
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    unknown = [name for name in names if name not in PROJECTIONS]
    if unknown or not names:
        raise InputError(f"adapter targets {list(names)}: known are all-linear or any of {', '.join(PROJECTIONS)}")
    return names


def add_lora(
    model: CausalLM, *, rank: int, alpha: float, targets: str | tuple[str, ...], key: Array, layers: int | None = None
) -> None:
    """Adds adapters to `model`, in place, scaled by `alpha / rank`; its outputs stay what they were.

    `layers`: only on that many layers at the top, split off if they are not yet; None: on all.
    """
    chosen = projections(targets)
    if layers is not None and not model.is_split:
        model.split_blocks(layers)
    for name, one in zip(PROJECTIONS, jax.random.split(key, len(PROJECTIONS)), strict=True):
        if name in chosen:
            getattr(model.stacks[-1], name).add_lora(rank, alpha / rank, one)


def merge_lora(model: CausalLM) -> CausalLM:
    """A new model in one stack with the adapters folded into the kernels, and without adapters and value head."""
    arrays = parameters(model)
    stack = "top_blocks" if model.is_split else "blocks"
    for name in PROJECTIONS:
        linear = getattr(model.stacks[-1], name)
        if linear.lora_scale is not None:
            kernel, scaled_b = linear.kernel[...], linear.lora_b[...] * linear.lora_scale
            delta = jnp.einsum("lir,lro->lio", linear.lora_a[...], scaled_b, precision="highest")
            arrays[f"{stack}.{name}.kernel"] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    for path in [path for path in arrays if path.startswith("top_blocks.") and ".lora_" not in path]:
        below = path.removeprefix("top_")
        arrays[below] = jnp.concatenate([arrays[below], arrays[path]])
    return assemble(model.config, arrays)

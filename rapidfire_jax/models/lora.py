"""Low-rank adapters (Hu et al. 2021) on the projections of a decoder."""

import math
from operator import attrgetter

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.decoder import Decoder
from rapidfire_jax.models.families import FAMILIES
from rapidfire_jax.models.quantization import TABLES, dense_table
from rapidfire_jax.models.weights import assemble, parameters

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(model: Decoder, targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """The projections of `model` that `targets` means: "all-linear", one name, or several.

    A name is one of ours, or the end of a module's name in the model's Hugging Face checkpoints (`c_attn` means query,
    key and value of GPT-2).

    Raises:
      InputError: no name, or one that is not in the model.
    """
    present = [name for name in PROJECTIONS if getattr(model.blocks, name) is not None]
    if targets == "all-linear":
        return tuple(present)
    modules = {name: module_name(model, name) for name in present}
    chosen, unknown = set(), []
    for target in (targets,) if isinstance(targets, str) else targets:
        meant = {name for name, module in modules.items() if target == name or f".{module}".endswith(f".{target}")}
        chosen |= meant
        if not meant:
            unknown.append(target)
    if unknown or not chosen:
        known = ", ".join(dict.fromkeys([*present, *(module.split(".")[-1] for module in modules.values())]))
        raise InputError(f"adapter targets {unknown}: this model has all-linear or any of {known}")
    return tuple(name for name in present if name in chosen)


def module_name(model: Decoder, projection: str) -> str:
    """The module of a Hugging Face checkpoint that holds a projection; {} is the layer."""
    return FAMILIES[model.config.family].names[f"blocks.{projection}.kernel"].removesuffix(".weight")


def add_lora(
    model: Decoder,
    *,
    rank: int,
    alpha: float,
    targets: str | tuple[str, ...],
    key: Array,
    layers: int | None = None,
    rslora: bool = False,
) -> None:
    """Adds adapters to `model`, in place; its outputs stay what they were.

    Args:
      model: without adapters.
      rank, alpha: adapters are scaled by `alpha / rank`.
      targets: see `projections`.
      key: initialises the adapters.
      layers: only on that many layers at the top, split off if they are not yet; None: on all.
      rslora: scale by `alpha / sqrt(rank)` instead (Kalajdzievski 2023).
    """
    chosen = projections(model, targets)
    if layers is not None and not model.is_split:
        model.split_blocks(layers)
    for name, one in zip(PROJECTIONS, jax.random.split(key, len(PROJECTIONS)), strict=True):
        if name in chosen:
            getattr(model.stacks[-1], name).add_lora(rank, alpha / (math.sqrt(rank) if rslora else rank), one)


def merged_parameter(model: Decoder, path: str, layer: int | None) -> Array:
    """A parameter of the model that `merge_lora` makes, as an array; of one layer if they are stacked.

    Nothing else is merged or restored: a model may be larger in 16 bits than there is room for.
    """
    parts = path.split(".")
    if layer is None:
        value = attrgetter(path)(model).get_value()
        return dense_table(value, model.weight_dtype) if path in TABLES else value
    first, stack = next((i, stack) for i, stack in reversed(model.numbered_stacks()) if i <= layer)
    owner = attrgetter(".".join(parts[1:-1]))(stack)
    if parts[-1] == "kernel":
        return owner.merged(model.weight_dtype, layer - first)
    return getattr(owner, parts[-1])[layer - first]


def merge_lora[M: Decoder](model: M) -> M:
    """A new model in one stack with the adapters folded into the kernels, and without adapters and value head.

    Quantised kernels that had an adapter become arrays in the dtype of the weights.
    """
    arrays = parameters(model)
    for name in PROJECTIONS:
        linears = [getattr(stack, name) for stack in model.stacks]
        if any(linear is not None and linear.lora_scale is not None for linear in linears):
            for prefix, linear in zip(("blocks", "top_blocks"), linears, strict=False):
                arrays[f"{prefix}.{name}.kernel"] = linear.merged(model.weight_dtype)
    for path in [path for path in arrays if path.startswith("top_blocks.") and ".lora_" not in path]:
        below = path.removeprefix("top_")
        arrays[below] = jax.tree.map(lambda *parts: jnp.concatenate(parts), arrays[below], arrays[path])
    return assemble(type(model), model.config, arrays, model.precision)

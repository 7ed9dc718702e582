"""Adapters in the format of `peft`: `adapter_config.json` and `adapter_model.safetensors`, in and out.

`peft` names modules as the Hugging Face checkpoint does. Where that fuses projections, ours have adapters of their own:
on the way in each takes the shared A and its columns of B; on the way out the parts stand side by side in one adapter
of the summed rank.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.decoder import Decoder, stack_size
from rapidfire_jax.models.families import FAMILIES, Family
from rapidfire_jax.models.folders import replacing
from rapidfire_jax.models.heads import RewardModel, ValueHead
from rapidfire_jax.models.layers import Linear
from rapidfire_jax.models.lora import PROJECTIONS, module_name
from rapidfire_jax.models.quantization import shape_of
from rapidfire_jax.models.safetensors import Safetensors
from rapidfire_jax.models.sources import read_json, resolve
from rapidfire_jax.models.weights import from_stored, to_stored

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
SCORE = "base_model.model.score.weight"  # the whole head of a sequence classifier stands beside its adapters
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of `init_lora_weights`


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """One module's adapter in `peft`'s layout: `B [out, r] @ A [r, in]`, scaled."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def load_adapter(model: Decoder, name: str) -> None:
    """Adds the adapters of a `peft` folder or repository to `model`, in place, to be trained on or merged.

    Layers and projections without an adapter in the file get one of zeros where others of their stack have one.

    Raises:
      InputError: no adapter there, an unsupported kind, or one for another base model.
    """
    folder = resolve(name)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: not an adapter: it must hold {CONFIG} and {WEIGHTS}")
    found, score = _read(folder, model)
    if score is not None:
        assert isinstance(model, RewardModel)
        model.add_value_head(ValueHead(jnp.asarray(score, model.score.dtype), None))
    for first, stack in model.numbered_stacks():
        for pattern, parts in _fused_projections(model).items():
            names = {i: pattern.format(first + i) for i in range(stack_size(stack))}
            adapters = {i: found[name] for i, name in names.items() if name in found}
            if adapters:
                _attach(model, [getattr(stack, part) for part in parts], parts[0], adapters)


def save_adapter(model: Decoder, folder: str | Path, *, base_model_name: str, rslora: bool = False) -> None:
    """Writes the adapters of `model` in the layout of `peft`, next to nothing of the base model.

    Args:
      model: with adapters.
      folder: new, empty, or an earlier export, which is replaced.
      base_model_name: what `peft` should load the adapters onto.
      rslora: write `use_rslora` and an alpha that means the same under it.

    Raises:
      InputError: `folder` holds something else, or there are no adapters.
    """
    modules = _fused_projections(model)
    tensors: dict[str, np.ndarray] = {}
    kinds: dict[str, dict[int, tuple[int, float]]] = {}  # rank and alpha in each layer
    for first, stack in model.numbered_stacks():
        for pattern, parts in modules.items():
            if all(getattr(stack, part).lora_scale is None for part in parts):
                continue
            for i in range(stack_size(stack)):
                adapter = _joined(model, stack, parts, i)
                if not adapter.a.any():
                    continue
                prefix = f"base_model.model.{pattern.format(first + i)}"
                tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = adapter.a, adapter.b
                rank = adapter.a.shape[0]
                alpha = adapter.scale * (math.sqrt(rank) if rslora else rank)
                kinds.setdefault(pattern, {})[first + i] = rank, alpha
    if not tensors:
        raise InputError("the model has no adapters to save")
    adapted = next(iter(kinds.values())).keys()
    if all(layers.keys() == adapted and len(set(layers.values())) == 1 for layers in kinds.values()):
        ranks = {_target(pattern, list(modules)): next(iter(layers.values())) for pattern, layers in kinds.items()}
    else:  # every module by its full name
        ranks = {pattern.format(i): kind for pattern, layers in kinds.items() for i, kind in layers.items()}
    if isinstance(model, RewardModel):
        tensors[SCORE] = np.asarray(model.score[...])[None]
    rank, alpha = max(set(ranks.values()), key=list(ranks.values()).count)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if isinstance(model, RewardModel) else "CAUSAL_LM",
        "modules_to_save": ["classifier", "score"] if isinstance(model, RewardModel) else None,
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, (r, _) in ranks.items() if r != rank},
        "alpha_pattern": {name: value for name, (_, value) in ranks.items() if value != alpha},
        "use_rslora": rslora,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "layers_to_transform": sorted(adapted) if len(adapted) < model.config.num_layers else None,
        "bias": "none",
        "fan_in_fan_out": FAMILIES[model.config.family].transposed,
        "inference_mode": True,
    }
    with replacing(Path(folder)) as new:
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, new / WEIGHTS, {"format": "pt"})


def _fused_projections(model: Decoder) -> dict[str, list[str]]:
    """Every module that can be adapted, {} being the layer -> the projections that it holds."""
    modules: dict[str, list[str]] = {}
    for projection in PROJECTIONS:
        if getattr(model.blocks, projection) is not None:
            modules.setdefault(module_name(model, projection), []).append(projection)
    return modules


def _attach(model: Decoder, linears: list[Linear], first: str, adapters: dict[int, _Adapter]) -> None:
    """Gives the linears of a module, of which `first` is the first projection, the module's adapters by layer."""
    layers, ins, _ = shape_of(linears[0].kernel.get_value())
    widths = [shape_of(linear.kernel.get_value())[-1] for linear in linears]
    rank = max(len(adapter.a) for adapter in adapters.values())
    scale = next(iter(adapters.values())).scale
    a = np.zeros((layers, ins, rank), np.float32)
    bs = [np.zeros((layers, rank, width), np.float32) for width in widths]
    for i, adapter in adapters.items():
        own = len(adapter.a)
        a[i, :, :own] = adapter.a.T
        columns = from_stored(_layout_of_b(model), f"blocks.{first}.kernel", adapter.b, widths, model.config.num_heads)
        for b, part in zip(bs, columns, strict=True):
            b[i, :own] = part * (adapter.scale / scale)
    for linear, b in zip(linears, bs, strict=True):
        linear.lora_a, linear.lora_b = nnx.LoRAParam(jnp.asarray(a)), nnx.LoRAParam(jnp.asarray(b))
        linear.lora_scale = scale


def _layout_of_b(model: Decoder) -> Family:
    """B is `[out, r]` whatever the axes of the weights."""
    return dataclasses.replace(FAMILIES[model.config.family], transposed=False)


def _joined(model: Decoder, stack: Any, parts: list[str], layer: int) -> _Adapter:
    """The adapter of a module that holds the projections `parts`."""
    linears = [getattr(stack, part) for part in parts]
    present = [linear for linear in linears if linear.lora_scale is not None]
    scale = present[0].lora_scale
    blocks = [np.asarray(linear.lora_a[...][layer]).T for linear in present]
    shared = len(present) == len(linears) and all(np.array_equal(blocks[0], block) for block in blocks)
    a = blocks[0] if shared else np.concatenate(blocks)
    columns, start = [], 0
    for linear in linears:
        b = np.zeros((len(a), shape_of(linear.kernel.get_value())[-1]), np.float32)
        if linear.lora_scale is not None:
            own = np.asarray(linear.lora_b[...][layer]) * np.float32(linear.lora_scale / scale)
            begin = 0 if shared else start
            b[begin : begin + len(own)] = own
            start += len(own)
        columns.append(b)
    b = to_stored(_layout_of_b(model), f"blocks.{parts[0]}.kernel", columns, model.config.num_heads)
    return _Adapter(np.ascontiguousarray(a), b, scale)


def _target(pattern: str, patterns: list[str]) -> str:
    """The shortest end of a module's name that no other module shares."""
    parts = pattern.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if sum(f".{other}".endswith(f".{end}") for other in patterns) == 1:
            return end
    return pattern


def _read(folder: Path, model: Decoder) -> tuple[dict[str, _Adapter], np.ndarray | None]:
    """The adapter of every module and the scalar head, checked against the model."""
    config = read_json(folder / CONFIG)
    where = folder / CONFIG
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise InputError(
            f"{where}: peft_type={config.get('peft_type')!r} with bias={config.get('bias', 'none')!r} is not "
            "supported; accepted: LORA with bias none"
        )
    for key in UNSUPPORTED:
        if config.get(key):
            raise InputError(f"{where}: {key}={config[key]!r} is not supported")
    initial = str(config.get("init_lora_weights"))
    if initial.lower().startswith(CHANGE_THE_BASE):
        raise InputError(
            f"{where}: init_lora_weights={initial!r} is not supported: the adapter fits a changed base model; save it "
            "with path_initial_model_for_weight_conversion"
        )
    saved = set(config.get("modules_to_save") or ()) - {"classifier", "score"}
    if saved:
        raise InputError(f"{where}: modules_to_save={config['modules_to_save']!r} is not supported; accepted: score")
    stored = Safetensors(folder / WEIGHTS, [folder / WEIGHTS])
    sides: dict[str, dict[str, str]] = {}
    problems = []
    score = None
    for name, shape in stored.shapes.items():
        if name == SCORE and isinstance(model, RewardModel) and shape == (1, model.config.hidden_size):
            score = stored.read(name)[0]
            if not np.isfinite(score).all():
                problems.append(f"NaN or infinite values: {name}")
        elif match := TENSOR.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = name
        else:
            problems.append(f"unexpected: {name}")
    wanted = _modules(model)
    found = {}
    for module, names in sides.items():
        if module not in wanted or names.keys() != {"A", "B"}:
            problems.append(f"unexpected: {module}" if module not in wanted else f"incomplete: {module}")
            continue
        a, b = (stored.shapes[names[side]] for side in "AB")
        if len(a) != 2 or len(b) != 2 or (a[1], b[0]) != wanted[module] or a[0] != b[1]:
            ins, outs = wanted[module]
            problems.append(f"shape of {module}: found {list(b)} x {list(a)}, expected [{outs}, r] x [r, {ins}]")
            continue
        values = [stored.read(names[side]).astype(np.float32) for side in "AB"]
        if not all(np.isfinite(value).all() for value in values):
            problems.append(f"NaN or infinite values: {module}")
        found[module] = _Adapter(values[0], values[1], _scale(config, module, a[0], where))
    if problems:
        base = config.get("base_model_name_or_path")
        raise InputError(
            "\n  ".join([f"{folder}: the adapter, made for {base!r}, does not fit this model:", *problems])
        )
    if not found:
        raise InputError(f"{folder / WEIGHTS}: holds no adapters")
    return found, score


def _modules(model: Decoder) -> dict[str, tuple[int, int]]:
    """Name of every module that can be adapted -> input and output width."""
    sizes = {}
    for pattern, parts in _fused_projections(model).items():
        shapes = [shape_of(getattr(model.blocks, part).kernel.get_value()) for part in parts]
        sizes[pattern] = shapes[0][-2], sum(shape[-1] for shape in shapes)
    return {pattern.format(i): size for pattern, size in sizes.items() for i in range(model.config.num_layers)}


def _scale(config: dict[str, Any], module: str, rank: int, where: Path) -> float:
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or alpha == 0:
        raise InputError(f"{where}: lora_alpha={alpha!r}; expected a number other than 0")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

"""PPO with LoRA on one GPU at the size of Llama 3 8B: TRL 1.12.0 and our own jobs, one after the other.

    python -m benchmarks.one_gpu --folder FOLDER [--size 8b] [--sides trl,bf16,nf4] [--iterations 2] [--price 2.5]

Random weights in bfloat16, a reward model of the same shape on the same trunk, prompts and responses of 512 tokens,
rank 16 on all linear layers, 4 epochs of 1 minibatch. Sides, of which each has a batch that is good for it:

    trl   peft on policy and critic (its critic with every weight trained does not fit), its own `generate`, gradient
          checkpointing; the first of its settings for which the memory of the card is enough
    bf16  `rapidfire train`, weights in bfloat16, products of the layers kept for the backward pass
    nf4   the same with policy and reward model in NF4 and a cache of int8, and nothing kept but the layers' inputs

`1b` has the same batch on all sides. FOLDER keeps the weights, and the configurations of our sides, for which
`rapidfire plan FOLDER/nf4.yaml --device h100-80gb` says what was to be expected. Every side is a process of its own;
its first iteration compiles and does not count. "peak GB" is of the device's allocator; "scoring s" of ours is the
reward model alone, and "update s" has the reference in it.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from safetensors.numpy import save_file

from benchmarks.peers.words import word_tokenizer
from benchmarks.results import append, show
from benchmarks.workers import Worker, peer_python
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.families import FAMILIES, to_hugging_face
from rapidfire_jax.models.heads import CausalLM, RewardModel
from rapidfire_jax.models.rope import Rope
from rapidfire_jax.models.weights import stored_shapes

PROMPT, RESPONSE, PROMPTS = 512, 512, 256
ADDED = 2  # EOS and padding, which end the vocabulary
LLAMA = {"max_positions": 8192, "rope": Rope(theta=500_000.0), "tie_embeddings": False}
SIZES = {
    "1b": DecoderConfig(128_256, 2048, 8192, 16, 32, 8, 64, **LLAMA),
    "8b": DecoderConfig(128_256, 4096, 14336, 32, 32, 8, 128, **LLAMA),
}
TRL = {"checkpointing": True, "dtype": "bfloat16", "device": "cuda", "critic_lora": True}
# Rows of a batch, of a step forward and backward, and of a rollout.
TRL_BATCHES = {"1b": ((32, 8, 32), (32, 4, 16)), "8b": ((32, 4, 32), (32, 4, 16), (16, 2, 16), (16, 1, 8))}
OURS_BATCHES = {"1b": {"bf16": (32, 4), "nf4": (32, 4)}, "8b": {"bf16": (64, 8), "nf4": (64, 16)}}
SIDES = ("trl", "bf16", "nf4")
LORA = {"rank": 16, "alpha": 32, "targets": "all-linear"}
COMMON = {"epochs": 4, "learning_rate": 1e-5, "temperature": 1.0, "kl_coef": 0.02, "seed": 0}


def write_models(folder: Path, config: DecoderConfig) -> None:
    """Policy, reward model and prompts, unless they are there. The reward model has the policy's trunk."""
    if (folder / "prompts.npy").exists():
        return
    tokenizer = word_tokenizer(config.vocab_size - ADDED)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name in ("policy", "reward"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        described = to_hugging_face(config, dtype="bfloat16", scalar_head=name == "reward")
        (folder / name / "config.json").write_text(json.dumps(described | special))
        tokenizer.save_pretrained(folder / name)
    _write_weights(folder, config)
    prompts = np.random.default_rng(2).integers(config.vocab_size - ADDED, size=(PROMPTS, PROMPT)).astype(np.int32)
    with (folder / "prompts.jsonl").open("w") as file:
        for row in prompts.tolist():
            file.write(json.dumps({"prompt": " ".join(f"t{token}" for token in row)}) + "\n")
    np.save(folder / "prompts.npy", prompts)


def _write_weights(folder: Path, config: DecoderConfig) -> None:
    """A file a layer, drawn one by one; the files of the trunk lie with the policy, the reward model links to them."""
    family = FAMILIES[config.family]
    of_policy, of_reward = (stored_shapes(kind, family, config) for kind in (CausalLM, RewardModel))
    weight_maps: dict[str, dict[str, str]] = {"policy": {}, "reward": {}}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in (of_policy | of_reward).items():
        layer = name.partition(".layers.")[2].partition(".")[0]
        part = f"layer-{layer}" if layer else name
        parts.setdefault(f"{part}.safetensors", {})[name] = shape
    for number, (file, wanted) in enumerate(parts.items()):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), len(wanted))
        tensors = {name: np.asarray(_draw(k, shape)) for k, (name, shape) in zip(keys, wanted.items(), strict=True)}
        owners = [
            owner for owner, held in (("policy", of_policy), ("reward", of_reward)) if held.keys() >= wanted.keys()
        ]
        save_file(tensors, folder / owners[0] / file, {"format": "pt"})
        for owner in owners[1:]:
            (folder / owner / file).symlink_to(folder.resolve() / owners[0] / file)
        for owner in owners:
            weight_maps[owner] |= dict.fromkeys(tensors, file)
    for name, weight_map in weight_maps.items():
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))


@functools.partial(jax.jit, static_argnums=1)
def _draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.bfloat16) if len(shape) == 1 else 0.02 * jax.random.normal(key, shape, jnp.bfloat16)


def job(side: str, size: str, folder: Path) -> Path:
    """The configuration of one of our sides, written to the folder."""
    rows, micro_batches = OURS_BATCHES[size][side]
    small = side == "nf4"
    weights = {"dtype": "bfloat16"} | ({"quantize": "nf4"} if small else {})
    tree = {
        "task": "ppo",
        "seed": COMMON["seed"],
        "run_dir": str(folder / f"run_{side}"),
        "model": {"name": str(folder / "policy")} | weights,
        "adapter": {"type": "lora"} | LORA,
        "data": {"path": str(folder / "prompts.jsonl"), "format": "prompt", "max_prompt_length": PROMPT}
        | {"train": [0.0, 0.9], "held_out": [0.9, 1.0]},
        "reward": {"model": str(folder / "reward"), "max_length": PROMPT + RESPONSE} | weights,
        "rollout": {"batch_size": rows, "max_new_tokens": RESPONSE, "temperature": COMMON["temperature"]}
        | {"log_probs": "reuse"}
        | ({"cache": "int8"} if small else {}),
        "rl": {
            "kl_coef": COMMON["kl_coef"],
            "epochs": COMMON["epochs"],
            "minibatches": 1,
            "micro_batches": micro_batches,
        },
        "optimizer": {"name": "adamw", "learning_rate": COMMON["learning_rate"]},
        "memory": {"remat": "full" if small else "products"},
        "training": {"iterations": 100, "eval_prompts": 4},
    }
    path = folder / f"{side}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def start(side: str, size: str, folder: Path) -> tuple[Worker, int]:
    """A side after its first iteration, and the rows of its batch."""
    if side != "trl":
        worker = Worker(side, Path(sys.executable), "rapidfire_job", {"config": str(job(side, size, folder))}, folder)
        worker.iterate()
        return worker, OURS_BATCHES[size][side][0]
    for rows, micro_rows, rollout_rows in TRL_BATCHES[size]:
        batch = {"rows": rows, "micro_rows": micro_rows, "rollout_rows": rollout_rows}
        shape = {"folder": str(folder), "vocabulary": SIZES[size].vocab_size, "response": RESPONSE, "threads": 8}
        worker = Worker(side, peer_python(), "trl_ppo", COMMON | TRL | {"lora": LORA} | batch | shape, folder)
        try:
            worker.iterate()
        except RuntimeError as error:
            worker.close()
            if "out of memory" not in str(error):
                raise
            print(f"trl: out of memory with {batch}", file=sys.stderr)
            continue
        worker.started["batch"] = batch
        return worker, rows
    sys.exit("error: TRL is out of memory with every one of its settings")


def measure(side: str, size: str, folder: Path, iterations: int, price: float) -> dict[str, Any]:
    """A row of the table."""
    worker, rows = start(side, size, folder)
    with worker:
        for _ in range(iterations):
            worker.measure()
    counted = [answer for answer in worker.answers if answer["counts"]]
    seconds = {
        key: statistics.median(answer[key] for answer in counted)
        for key in ("seconds", "rollout s", "scoring s", "update s")
    }
    tokens = rows * RESPONSE
    rate = tokens / seconds["seconds"]
    return {
        "size": size,
        "side": side,
        "rows": rows,
        "tokens/s": rate,
        "rollout tokens/s": tokens / seconds["rollout s"],
        "s": seconds.pop("seconds"),
        **seconds,
        "peak GB": max(answer["device peak MB"] for answer in worker.answers) / 1e3,
        "$ a million tokens": price / 3600 / rate * 1e6,
        "start s": worker.loading + worker.answers[0]["seconds"],
        "iterations": len(counted),
        "batch": json.dumps(worker.started.get("batch", {})),
        "runs on": worker.started["versions"],
        "device": worker.started["device"],
    }


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="weights and configurations; 17 GB for each 8 B")
    parser.add_argument("--size", choices=tuple(SIZES), default="8b")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"any of {', '.join(SIDES)}")
    parser.add_argument("--iterations", type=int, default=2, help="measured ones of each side")
    parser.add_argument("--price", type=float, default=2.5, help="of the card, an hour")
    args = parser.parse_args()
    sides = args.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides: no {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    folder = args.folder / args.size
    folder.mkdir(parents=True, exist_ok=True)
    # In a process of its own: this one never takes memory of the card.
    writer = multiprocessing.get_context("spawn").Process(target=write_models, args=(folder, SIZES[args.size]))
    writer.start()
    writer.join()
    if writer.exitcode:
        sys.exit(f"error: cannot write the models to {folder}")
    rows = []
    for side in sides:
        rows.append(measure(side, args.size, folder, args.iterations, args.price))
        append("one_gpu", rows[-1:])
        print(json.dumps(rows[-1]), flush=True)
    show([{key: value for key, value in row.items() if key not in ("batch", "runs on", "device")} for row in rows])


if __name__ == "__main__":
    main()

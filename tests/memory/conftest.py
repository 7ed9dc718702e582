"""Gradients of tiny decoders, traced, and what stands in them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from rapidfire_jax.memory.devices import Device
from rapidfire_jax.models.config import DecoderConfig
from rapidfire_jax.models.heads import CausalLM
from rapidfire_jax.models.layers import take
from rapidfire_jax.models.lora import add_lora

KINDS = {
    "llama": {},
    "gpt2": {"norm": "layer", "rope": None, "gated": False, "activation": "gelu_new", "qkv_bias": True,
             "output_bias": True, "mlp_bias": True},
    "gemma2": {"post_norms": True, "norm_offset": 1.0, "attention_soft_cap": 30.0, "sliding_window": 4,
               "local_layers": (0, 2), "activation": "gelu_pytorch_tanh", "scale_embedding": True},
    "qwen3": {"qk_norm": True, "qkv_bias": True},
    "gpt_neox": {"norm": "layer", "parallel": True, "gated": False, "activation": "gelu"},
}  # fmt: skip
SLOW = Device("test", "test", 10**9, 1e9, 4e9, 2e9, 1e8, 1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A decoder with adapters on all layers, and the gradient of a loss with respect to them."""

    graphdef: nnx.GraphDef
    adapters: nnx.State
    frozen: nnx.State
    tokens: jax.Array
    mask: jax.Array
    weights: jax.Array  # of the loss

    def gradient(self, remat, at=None):
        """A function of adapters and frozen weights; the loss sees the hidden states of some positions, or of all."""

        def loss(adapters, frozen):
            model = nnx.merge(self.graphdef, adapters, frozen)
            hidden = model.hidden(self.tokens, self.mask, at=at, remat=remat)
            return (hidden * take(self.weights, at).astype(model.compute_dtype)).sum()

        return jax.grad(loss)

    def traced(self, remat, at=None) -> ClosedJaxpr:
        """Its program."""
        return jax.make_jaxpr(self.gradient(remat, at))(self.adapters, self.frozen)


@pytest.fixture(scope="session")
def problem():
    """Makes a problem of a kind of model."""

    def make(kind, *, layers=4, width=24, ffn=40, head=8, length=11, dtype=jnp.float32) -> Problem:
        config = DecoderConfig(
            vocab_size=67, hidden_size=width, intermediate_size=ffn, num_layers=layers, num_heads=width // head,
            num_kv_heads=1, head_dim=head, max_positions=64, **KINDS[kind],
        )  # fmt: skip
        model = CausalLM(config, dtype=dtype, rngs=nnx.Rngs(0))
        add_lora(model, rank=2, alpha=4.0, targets="all-linear", key=jax.random.key(1))
        graphdef, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)
        random = np.random.default_rng(0)
        noisy = lambda w: w + jnp.asarray(random.normal(size=w.shape), w.dtype) / 4  # noqa: E731
        mask = jnp.arange(length)[None] >= jnp.array([[0], [3], [5]])
        tokens = jnp.asarray(random.integers(0, 67, mask.shape), jnp.int32)
        weights = jnp.asarray(random.normal(size=(*mask.shape, width)), jnp.float32)
        adapters, frozen = jax.tree.map(noisy, (adapters, frozen))
        return Problem(graphdef, adapters, frozen, tokens, mask, weights)

    return make


def inner_jaxprs(eqn):
    for param in eqn.params.values():
        for value in param if isinstance(param, (tuple, list)) else [param]:
            if isinstance(value, (Jaxpr, ClosedJaxpr)):
                yield value.jaxpr if isinstance(value, ClosedJaxpr) else value


def product_flops(jaxpr) -> int:
    """FLOPs of all matrix products, those of loops as often as they go round."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in left)
        rounds = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += rounds * sum(map(product_flops, inner_jaxprs(eqn)))
    return total


def kept_bytes(jaxpr) -> int:
    """Bytes that loops over layers leave behind for the backward pass."""
    forward = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and not eqn.params["reverse"]]
    outer = [
        (o.aval, i.aval) for eqn in forward for o, i in zip(eqn.outvars, next(inner_jaxprs(eqn)).outvars, strict=True)
    ]
    return sum(
        o.size * o.dtype.itemsize for o, i in outer if o.shape != i.shape and jnp.issubdtype(o.dtype, jnp.inexact)
    )

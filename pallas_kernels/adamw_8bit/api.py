"""AdamW whose two moments take 2 bytes an element instead of 8, in one pass and in place."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from pallas_kernels.adamw_8bit import mosaic_gpu
from pallas_kernels.adamw_8bit.reference import BLOCK, Moments, Numbers, adamw_8bit_reference, mix
from pallas_kernels.dispatch import Implementation, Operation, hopper_kernel

type Number = Float[Array, ""] | float


def init_moments(param: Float[Array, "*M"]) -> Moments:
    """The moments of a parameter before its first step: zeros."""
    blocks = -(-param.size // BLOCK)
    return Moments(
        jnp.zeros(param.shape, jnp.int8),
        jnp.zeros((blocks,), jnp.float32),
        jnp.zeros(param.shape, jnp.uint8),
        jnp.zeros((blocks,), jnp.float32),
    )


def adamw_8bit(
    param: Float[Array, "*M"],
    grad: Float[Array, "*M"],
    moments: Moments,
    *,
    step: Int[Array, ""] | int,
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    key: Key[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*M"], Moments]:
    """One step of AdamW on one array; its moments are kept as 8-bit codes with a scale for every 256 elements.

    Equivalent, up to the rounding of moments and parameter, to

        m = b1 * m + (1 - b1) * grad
        v = b2 * v + (1 - b2) * grad**2
        update = m / (1 - b1**step) / (sqrt(v / (1 - b2**step)) + eps)
        param = param - learning_rate * (update + weight_decay * param)

    in float32; the update sees the new moments before they are rounded. Blocks are runs of 256 elements in row-major
    order, the last one as long as what is left, and do not see each other. Under `shard_map`, pieces of an array cut
    along its first axis, of a multiple of 256 elements each, have the blocks of the whole, and scales are cut like it;
    only the random bits differ, and pieces that are given the same key share them. The kernel writes in place where
    parameter and moments are donated and nothing else reads them, outside `shard_map` or with its `check_vma=False`.

    A gradient that is not finite, or whose square is not, leaves its element and, from the next step on, its block
    without finite values; other blocks never notice.

    Args:
      param: float32 or bfloat16; any shape.
      grad: float32 or bfloat16; the shape of `param`.
      moments: from `init_moments` or the last step.
      step: 1 at the first step.
      learning_rate, b1, b2, eps, weight_decay: numbers, traced or not.
      key: rounds a bfloat16 parameter stochastically, without which steps smaller than half its last bit are lost.
        None: to nearest. The bits, also those that round v, are a hash of key, step and index, the same for every
        implementation.
      implementation: "mosaic_gpu", "xla", or None for the first of them that can serve the call.

    Returns:
      The new parameter and moments. No gradients flow.

    Raises:
      ValueError: shapes that do not belong together, an unknown implementation.
      NotImplementedError: the named implementation cannot serve the call; all reasons.

    References: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019; Dettmers et al., 8-bit Optimizers
    via Block-wise Quantization, 2022 (whose code maps are others).
    """
    wanted = jax.eval_shape(init_moments, param)
    for name, x, like in [("grad", grad, param), *zip(Moments._fields, moments, wanted, strict=True)]:
        if x.shape != like.shape:
            raise ValueError(f"{name} {x.shape} is not of shape {like.shape}, which param {param.shape} needs")
    count = jnp.asarray(step, jnp.float32)
    b1, b2, rate, eps, decay = (jnp.asarray(x, jnp.float32) for x in (b1, b2, learning_rate, eps, weight_decay))
    numbers = Numbers(b1, b2, rate / (1.0 - b1**count), lax.rsqrt(1.0 - b2**count), eps, 1.0 - rate * decay)
    stochastic = key is not None and param.dtype == jnp.bfloat16
    return OPERATION(implementation, param, grad, moments, numbers, _seed(key, step), stochastic)


def _seed(key, step):
    seed = mix(jnp.asarray(step).astype(jnp.uint32))
    for word in [] if key is None else jax.random.key_data(key).reshape(-1):
        seed = mix(seed ^ word)
    return seed


OPERATION = Operation(
    "adamw_8bit",
    {
        "mosaic_gpu": hopper_kernel(mosaic_gpu.adamw_8bit_step, mosaic_gpu.reasons),
        "xla": Implementation(adamw_8bit_reference),
    },
)

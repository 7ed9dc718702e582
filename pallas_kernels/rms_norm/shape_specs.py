"""Calls of `rms_norm` in real models."""

from functools import partial

from pallas_kernels.rms_norm.api import rms_norm
from pallas_kernels.rms_norm.mosaic_gpu_vjp import heuristic
from pallas_kernels.shape_specs import BATCH, LENGTH, MODELS, Call, Cost, forward_and_backward, nbytes, shape


def calls(model: str) -> list[Call]:
    """The norm before attention or MLP, with the residual added, in a training step."""
    width = MODELS[model].width
    x, scale = shape(BATCH * LENGTH, width), shape(width)
    rows = nbytes(x)
    partial_sums = 4 * width * heuristic(*x.shape).blocks
    costs = {
        "rms_norm_forward": Cost(0, 4 * rows, 4 * rows),
        "rms_norm_backward": Cost(0, 4 * rows, 4 * rows + 2 * partial_sums),
    }
    function = partial(_with_residual, eps=1e-5)
    return [Call(f"residual norm, {model}", forward_and_backward(function, 0, 1, 2), (x, x, scale), costs)]


def _with_residual(x, residual, scale, eps):
    return rms_norm(x, scale, residual, eps=eps)

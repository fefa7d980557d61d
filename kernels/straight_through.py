"""The straight-through gradient of a quantized layer with respect to its input.

A layer's output is a staircase in its input, because activations are rounded to a few bits: its derivative is zero
almost everywhere and useless for training. The straight-through estimator (Bengio, Leonard, Courville 2013, arXiv
1308.3432) counts rounding, clipping and the scale's dependence on the input as the identity in the backward pass. What
remains is a linear layer, so grad_x = grad_y @ W with the dequantized weight W. With unquantized activations (16 bits)
this is the exact gradient. Weights, scales and the bias of a quantized layer are constants, which get no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from bwla_kernels.precision import without_autocast
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor], weight: Callable[[], Tensor]
    ) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        with without_autocast(x.device):
            return compute(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        with without_autocast(gradient.device):
            return (gradient.float() @ ctx.weight()).to(ctx.dtype), None, None


def straight_through(x: Tensor, compute: Callable[[Tensor], Tensor], weight: Callable[[], Tensor]) -> Tensor:
    """Return `compute(x)`, with the gradient of x times a weight.

    Args:
        x: [..., K].
        compute: function of x that returns [..., N].
        weight: returns the dequantized weight, float32 [N, K]; called in the backward pass.
    """
    function: Any = _StraightThrough.apply  # untyped in torch
    result: Tensor = function(x, compute, weight)
    return result

"""The language-model head and the embedding in 8 bits: quantization, reference implementation and torch backend.

Weights are int8 with one scale per row. Activations are quantized to 16 bits, dynamically, with one scale per token:
the rounding error is then 2^-15 of the largest magnitude, far below that of bfloat16, while both halves of a code
still fit the processor's 8-bit dot products. At one token a head is bound by memory, so the second pass is free.

    s[m] = max|x[m]| / 32639,  q = round_half_even(x / s),  y[m, n] = s[m] * scale[n] * sum_k W[n, k] q[m, k]
"""

from collections.abc import Mapping

import torch
from bwla_kernels import gradients
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.straight_through import straight_through
from bwla_kernels.torch_backend import int_matmul
from torch import Tensor

Q_MAX = 127 * 256 + 127
"""Largest activation code, 32,639: the rounded high byte of a code still fits int8."""

HEAD_CHUNK = 8192
"""Rows of a head that are quantized at once."""

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LAYER = "Tensor weight_int8, Tensor weight_scale"
_LIBRARY.define(f"head_torch(Tensor x, {_LAYER}) -> Tensor")


def quantize_head(weight: Tensor) -> dict[str, Tensor]:
    """Quantize the weight [V, K] of a head or an embedding to `weight_int8` and `weight_scale`.

    Round to nearest, symmetric, with one scale per row. A row of zeros gets codes 0 and the smallest positive scale.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    # In chunks, so that a vocabulary of 150,000 rows needs no float32 copy of the whole head.
    for start in range(0, weight.shape[0], HEAD_CHUNK):
        part = slice(start, start + HEAD_CHUNK)
        weights = weight[part].float()
        scale[part] = (weights.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        codes[part] = torch.round(weights / scale[part].unsqueeze(1)).clamp(-127, 127).to(torch.int8)
    return {"weight_int8": codes, "weight_scale": scale}


def dequantize_rows(weight_int8: Tensor, weight_scale: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up rows of an 8-bit embedding, dequantized: ids [...] -> [..., K] in `dtype`.

    Codes [V, K] times scales [V] are computed in float32 and rounded once, so the result equals a lookup in the
    dequantized embedding.
    """
    return (weight_int8[ids].float() * weight_scale[ids].float().unsqueeze(-1)).to(dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize [M, K] to 16-bit codes (as int32 [M, K]) and one float32 scale per token [M]; zeros give scale 0."""
    scale = x.float().abs().amax(1) * (1.0 / Q_MAX)
    codes = torch.round(x.float() / scale.unsqueeze(1)).clamp(-Q_MAX, Q_MAX)
    return torch.where(scale.unsqueeze(1) == 0, torch.zeros_like(codes), codes).to(torch.int32), scale


def head_reference(x: Tensor, weight_int8: Tensor, weight_scale: Tensor) -> Tensor:
    """Compute logits by the reference implementation: [..., K] -> [..., V] in the dtype of x.

    Float64 holds the integer sums exactly. The gradient with respect to x is straight-through: that of x times the
    dequantized weight (see `straight_through`).
    """

    def compute(x: Tensor) -> Tensor:
        codes, scale = quantize_tokens(x.reshape(-1, x.shape[-1]))
        sums = codes.double() @ weight_int8.double().t()
        y = sums.float() * (scale.unsqueeze(1) * weight_scale)
        return y.to(x.dtype).reshape(*x.shape[:-1], weight_int8.shape[0])

    return straight_through(x, compute, lambda: weight_int8 * weight_scale.unsqueeze(1))


def _head(x: Tensor, weight_int8: Tensor, weight_scale: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight_int8.shape[0])
    codes, scale = quantize_tokens(rows)
    # codes = 256 high + low with low in [-128, 127]: two exact products of 8-bit integers.
    high = (codes + 128) >> 8
    low = codes - (high << 8)
    sums = int_matmul(high.to(torch.int8), weight_int8).double() * 256
    sums += int_matmul(low.to(torch.int8), weight_int8)
    y = sums.float() * (scale.unsqueeze(1) * weight_scale)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight_int8.shape[0])


def _head_fake(x: Tensor, weight_int8: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_int8.shape[0])


_LIBRARY.impl("head_torch", _head, "CompositeExplicitAutograd")
torch.library.register_fake("bwla::head_torch", _head_fake, lib=_LIBRARY)
gradients.register_input_gradient(
    _LIBRARY, "head_torch", _LAYER, gradients.head_input_gradient, lambda weight, *_: weight.shape[1]
)


class TorchHead:
    """Compute the head with plain torch on any device, as two 8-bit integer products."""

    name = "torch"

    def can_implement(self, spec: HeadSpec, device: torch.device) -> tuple[bool, str]:
        """Return True and the reason: plain torch runs anywhere."""
        return True, "plain torch runs anywhere"

    def prepare(self, tensors: Mapping[str, Tensor], spec: HeadSpec) -> dict[str, Tensor]:
        """Return the stored tensors as they are."""
        return dict(tensors)

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: HeadSpec) -> Tensor:
        """Compute x [..., K] -> [..., V] in the dtype of x."""
        y: Tensor = torch.ops.bwla.head_torch(x, tensors["weight_int8"], tensors["weight_scale"])
        return y

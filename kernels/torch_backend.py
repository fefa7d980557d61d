"""The torch backend: plain torch on unpacked int8 signs and an integer matmul, on any device.

It follows `reference.py` step by step, except that the signs are unpacked only once, at load.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bwla_kernels import gradients, reference
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import UNQUANTIZED_BITS, to_compute_dtype
from bwla_kernels.precision import without_autocast
from torch import Tensor

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LAYER = (
    "Tensor signs, Tensor weight_scale, Tensor? rotation_left, Tensor? rotation_right, Tensor? column_scale, "
    "Tensor? low_rank_a, Tensor? low_rank_b, Tensor? bias, int bits, float clip"
)
_LIBRARY.define(f"linear_torch(Tensor x, {_LAYER}) -> Tensor")

INT_MM_MIN_ROWS = 17
"""Fewest rows that cuBLAS accepts in an integer matmul."""


def int_matmul(q: Tensor, signs: Tensor) -> Tensor:
    """Multiply int8 codes [M, K] and int8 signs [N, K] exactly: int32 [M, N]."""
    rows = q.shape[0]
    if q.is_cuda and rows < INT_MM_MIN_ROWS:
        q = torch.nn.functional.pad(q, (0, 0, 0, INT_MM_MIN_ROWS - rows))
    return torch._int_mm(q, signs.t())[:rows]


def _linear(x: Tensor, *layer: Any) -> Tensor:
    with without_autocast(x.device):
        return _compute(x, *layer)


def _compute(
    x: Tensor,
    signs: Tensor,
    weight_scale: Tensor,
    rotation_left: Tensor | None,
    rotation_right: Tensor | None,
    column_scale: Tensor | None,
    low_rank_a: Tensor | None,
    low_rank_b: Tensor | None,
    bias: Tensor | None,
    bits: int,
    clip: float,
) -> Tensor:
    planes, out_features, in_features = signs.shape
    flat = x.reshape(-1, in_features)
    scales = weight_scale.view(out_features, planes, -1).unbind(1)
    if rotation_left is None or rotation_right is None or column_scale is None:
        groups, x_hat = scales[0].shape[1], flat.float()
    else:
        groups = rotation_left.shape[0]
        x_hat = reference.rotate(flat, rotation_left, rotation_right) * column_scale
    width = in_features // groups
    if flat.shape[0] == 0:
        y = flat.new_zeros(0, out_features, dtype=torch.float32)
    elif bits == UNQUANTIZED_BITS:
        y = x_hat @ _dequantize_rows(signs, scales).t()
    else:
        q, scale = reference.quantize(x_hat, groups, bits, clip)
        y = flat.new_zeros(flat.shape[0], out_features, dtype=torch.float32)
        for plane, plane_scale in zip(signs, scales, strict=True):
            sums = torch.zeros_like(y)
            for g in range(groups):
                part = slice(g * width, (g + 1) * width)
                product = int_matmul(q[:, part], plane[:, part]) * scale[:, g : g + 1]
                sums += product if plane_scale.shape[1] == 1 else product * plane_scale[:, g]
            y += sums * plane_scale[:, 0] if plane_scale.shape[1] == 1 else sums
    if low_rank_a is not None and low_rank_b is not None:
        y += flat.float() @ low_rank_a.float().t() @ low_rank_b.float().t()
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)


def _dequantize_rows(signs: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """Return rows of the weight in the basis that it is stored in: float32 [N, K].

    Args:
        signs: int8 [P, N, K].
        scales: of each plane, float32 [N, 1 or G].
    """
    weight = torch.zeros(signs.shape[1:], device=signs.device)
    for plane, scale in zip(signs, scales, strict=True):
        weight += (plane.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)
    return weight


def _linear_fake(x: Tensor, signs: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], signs.shape[1])


_LIBRARY.impl("linear_torch", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("bwla::linear_torch", _linear_fake, lib=_LIBRARY)


def _input_gradient(
    gradient: Tensor,
    signs: Tensor,
    weight_scale: Tensor,
    rotation_left: Tensor | None,
    rotation_right: Tensor | None,
    column_scale: Tensor | None,
    low_rank_a: Tensor | None,
    low_rank_b: Tensor | None,
    *_: object,
) -> Tensor:
    planes, rows, columns = signs.shape
    scales = weight_scale.view(rows, planes, -1).unbind(1)
    parts = gradients.row_slabs(rows, planes * columns)
    slabs = (_dequantize_rows(signs[:, part], [scale[part] for scale in scales]) for part in parts)
    if rotation_left is None or rotation_right is None or column_scale is None:
        return gradients.product_of_slabs(gradient, slabs, columns)
    return gradients.linear_input_gradient(
        gradient, slabs, rotation_left, rotation_right, column_scale, low_rank_a, low_rank_b
    )


gradients.register_input_gradient(
    _LIBRARY, "linear_torch", _LAYER, _input_gradient, lambda signs, *_: signs.shape[-1]
)


class TorchBackend:
    """Compute a layer with plain torch on any device."""

    name = "torch"

    def can_implement(self, spec: LayerSpec, device: torch.device) -> tuple[bool, str]:
        """Return True and the reason: plain torch runs anywhere."""
        return True, "plain torch runs anywhere"

    def prepare(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Replace `weight_packed` by `signs` int8 [P, N, K]; keep the rest, rotations and scales in float32."""
        rest = {name: tensor for name, tensor in to_compute_dtype(tensors).items() if name != "weight_packed"}
        signs, _ = reference.planes(tensors, spec)
        return {"signs": signs.transpose(0, 1).contiguous(), **rest}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Compute x [..., K] -> [..., N] in the dtype of x."""
        y: Tensor = torch.ops.bwla.linear_torch(
            x,
            tensors["signs"],
            tensors["weight_scale"],
            tensors.get("rotation_left"),
            tensors.get("rotation_right"),
            tensors.get("column_scale"),
            tensors.get("low_rank_a"),
            tensors.get("low_rank_b"),
            tensors.get("bias"),
            spec.bits,
            spec.clip,
        )
        return y

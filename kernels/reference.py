"""Reference implementation: a BWLA layer in plain torch, on any device (see docs/format.md).

Every kernel is tested against these functions, which are written for clarity rather than speed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_kernels.format import LayerSpec, unpack_signs
from bwla_kernels.format.layer import UNQUANTIZED_BITS
from bwla_kernels.straight_through import straight_through
from torch import Tensor


@dataclass(frozen=True)
class PreparedInput:
    """The transformed input, which the GEMM multiplies with the signs.

    Attributes:
        q: int8 codes [M, K]; float32 x_hat where the activations are not quantized.
        scale: float32 [M, G], one scale per token and rotation group (ones where not quantized).
        u: float32 [M, r], x A^T; None for rank 0.
    """

    q: Tensor
    scale: Tensor
    u: Tensor | None


def rotate(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rotate the last axis: each rotation group X, row-major [n1, n2], becomes L^T X R.

    Args:
        x: [..., K], any float dtype; computed in float32 (float64 stays).
        left: rotation_left [G, n1, n1].
        right: rotation_right [G, n2, n2].

    Returns: [..., K] float32 (or float64), in the rotated basis. The map is orthogonal and linear,
        so x W^T is unchanged when the rows of W are rotated too.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups, n1, n2 = left.shape[0], left.shape[-1], right.shape[-1]
    cells = x.to(work).reshape(-1, groups, n1, n2)
    rotated = left.to(work).transpose(-1, -2) @ cells @ right.to(work)
    return rotated.reshape(x.shape)


def rotate_back(x_hat: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Undo `rotate`: each rotation group X becomes L X R^T."""
    return rotate(x_hat, left.transpose(-1, -2), right.transpose(-1, -2))


def quantize(x_hat: Tensor, rotation_groups: int, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    """Quantize each rotation group of each token dynamically and symmetrically, rounding half to even.

    Args:
        x_hat: float32 [M, K], rotated and column-scaled.
        rotation_groups: G.
        bits: 2..8.
        clip: fraction of max|x_hat| that the largest code represents.

    Returns: codes int8 [M, K] in [-q_max, q_max] and scales float32 [M, G]; a group of zeros has scale 0
        and codes 0.
    """
    q_max = (1 << (bits - 1)) - 1
    cells = x_hat.unflatten(1, (rotation_groups, x_hat.shape[1] // rotation_groups))
    scale = cells.abs().amax(-1) * (clip / q_max)
    codes = torch.round(cells / scale.unsqueeze(-1)).clamp(-q_max, q_max)
    codes = torch.where(scale.unsqueeze(-1) == 0, torch.zeros_like(codes), codes)
    return codes.to(torch.int8).reshape(x_hat.shape), scale


def prepare_input(x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> PreparedInput:
    """Transform the input: rotate, scale the columns, quantize, and project onto the low-rank rows.

    Args:
        x: [M, K], any float dtype.
        tensors: the layer's input transform (`rotation_left`, `rotation_right`, `column_scale`, and `low_rank_a`
            where the rank is not 0); a grouped layer has none, and x is only quantized.
        spec: the layer.
    """
    if spec.grouped:
        x_hat = x.float()
    else:
        x_hat = rotate(x, tensors["rotation_left"], tensors["rotation_right"]) * tensors["column_scale"]
    if spec.bits == UNQUANTIZED_BITS:
        q, scale = x_hat, x_hat.new_ones(x.shape[0], spec.rotation_groups)
    else:
        q, scale = quantize(x_hat, spec.rotation_groups, spec.bits, spec.clip)
    u = x.float() @ tensors["low_rank_a"].float().t() if spec.rank else None
    return PreparedInput(q, scale, u)


def group_sums(q: Tensor, signs: Tensor, rotation_groups: int) -> Tensor:
    """Return the dot products of each rotation group, sum_{k in g} S[n, k] q[m, k], as float32 [M, G, N].

    For integer codes they are exact integers: every partial sum stays below
    127 * 65,536 < 2^24, which float32 holds exactly.
    """
    cells = q.float().unflatten(1, (rotation_groups, q.shape[1] // rotation_groups))
    sign_cells = signs.float().unflatten(1, (rotation_groups, signs.shape[1] // rotation_groups))
    return torch.einsum("mgk,ngk->mgn", cells, sign_cells)


def planes(tensors: Mapping[str, Tensor], spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return the signs of all planes, int8 [N, P, K], and their scales [N, P, 1 or G] as they are stored."""
    signs = unpack_signs(tensors["weight_packed"]).view(-1, spec.planes, spec.in_features)
    return signs, tensors["weight_scale"].view(-1, spec.planes, spec.scales_per_row)


def binary_matmul(prepared: PreparedInput, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
    """Multiply with the binary planes: float32 [M, N] = sum_p sum_g alpha_pg * s_g * (S_pg q_g) + u B^T + b.

    alpha_pg is the same for all g but in a grouped layer.
    """
    signs, scales = planes(tensors, spec)
    y = torch.zeros(len(prepared.q), spec.out_features, device=prepared.q.device)
    for plane, scale in zip(signs.unbind(1), scales.unbind(1), strict=True):
        sums = group_sums(prepared.q, plane, spec.rotation_groups) * prepared.scale.unsqueeze(-1)
        y += (sums * scale.t()).sum(1) if spec.grouped else sums.sum(1) * scale.squeeze(-1)
    if prepared.u is not None:
        y = y + prepared.u @ tensors["low_rank_b"].float().t()
    if spec.bias:
        y = y + tensors["bias"].float()
    return y


def linear(x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
    """Compute the layer: x [..., K] -> [..., N] in the dtype of x, computed in float32.

    The gradient with respect to x is straight-through: that of x times the dequantized weight, as if activations were
    not quantized (see `straight_through`). The layer's tensors get none.
    """

    def compute(x: Tensor) -> Tensor:
        flat = x.reshape(-1, spec.in_features)
        y = binary_matmul(prepare_input(flat, tensors, spec), tensors, spec)
        return y.to(x.dtype).reshape(*x.shape[:-1], spec.out_features)

    return straight_through(x, compute, lambda: dequantize(tensors, spec))


def dequantize(tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
    """Return the dequantized weight, float32 [N, K] in the basis of the original x.

    `linear` with unquantized activations equals x times this weight (plus the bias).
    """
    signs, scales = planes(tensors, spec)
    cells = signs.float().unflatten(-1, (spec.scales_per_row, -1))
    rotated: Tensor = (cells * scales.float().unsqueeze(-1)).sum(1).flatten(1)
    if spec.grouped:
        return rotated
    weight = rotate_back(
        rotated * tensors["column_scale"], tensors["rotation_left"], tensors["rotation_right"]
    )
    if spec.rank:
        weight = weight + tensors["low_rank_b"].float() @ tensors["low_rank_a"].float()
    return weight

"""The gradient of a packed layer's input on the CPU; layout.h describes how the layer's parts lie in memory."""

import torch
from bwla_kernels import gradients
from bwla_kernels.cpu.library import Isa
from bwla_kernels.cpu.linear import PANEL_ROWS, unpack_rows
from bwla_kernels.format import LayerSpec
from torch import Tensor

LINE = 64
"""Bytes to which the parts of a packed layer are padded."""

VECTOR = 16
"""Multiple to which the rows of a right rotation are padded."""

INTERLEAVED, STEP = 4, 32
"""Rows of low_rank_a that lie side by side, in pieces of so many columns."""


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def unpack_input_transform(packed: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
    """View the input transform in a packed layer: rotations and column scale float32, `low_rank_a` bfloat16 [r, K]."""
    groups, n1, n2, columns, padded = (
        spec.rotation_groups, spec.n1, spec.n2, spec.in_features, _round_up(spec.n2, VECTOR)
    )  # fmt: skip
    right_at = _round_up(groups * n1 * n1 * 4, LINE)
    column_scale_at = right_at + groups * n2 * padded * 4
    low_rank_at = column_scale_at + columns * 4
    tensors = {
        "rotation_left": packed[: groups * n1 * n1 * 4].view(torch.float32).view(groups, n1, n1),
        "rotation_right": packed[right_at:column_scale_at]
        .view(torch.float32)
        .view(groups, n2, padded)[..., :n2],
        "column_scale": packed[column_scale_at:low_rank_at].view(torch.float32),
    }
    if spec.rank:
        rows = _round_up(spec.rank, INTERLEAVED)
        pieces = packed[low_rank_at : low_rank_at + rows * columns * 2].view(torch.bfloat16)
        pieces = pieces.view(-1, columns // STEP, INTERLEAVED, STEP).transpose(1, 2)
        tensors["low_rank_a"] = pieces.reshape(rows, columns)[: spec.rank]
    return tensors


def unpack_low_rank_b(packed: Tensor, spec: LayerSpec) -> Tensor:
    """Return `low_rank_b` bfloat16 [N, r] from a packed layer, where each panel of rows ends with its own."""
    panels, size = -(-spec.out_features // PANEL_ROWS), spec.rank * PANEL_ROWS * 2
    panel = spec.planes * (spec.in_features // 8 + 4) * PANEL_ROWS + size
    stored = packed[packed.shape[0] - panels * panel :].view(panels, panel)[:, panel - size :]
    by_rank = stored.contiguous().view(torch.bfloat16).view(panels, spec.rank, PANEL_ROWS)
    return by_rank.transpose(1, 2).reshape(-1, spec.rank)[: spec.out_features]


def input_gradient(gradient: Tensor, packed: Tensor, spec: LayerSpec, isa: Isa | None = None) -> Tensor:
    """Return the gradient of the input, float32 [M, K], from that of the output [M, N].

    Args:
        gradient: any float dtype.
        packed: from `linear.pack` with the same spec and variant.
        spec: the layer.
        isa: variant; by default the loaded one.
    """
    parts = gradients.row_slabs(spec.out_features, spec.in_features, PANEL_ROWS)
    slabs = (unpack_rows(packed, spec, part, isa) for part in parts)
    if spec.grouped:
        return gradients.product_of_slabs(gradient, slabs, spec.in_features)
    transform = unpack_input_transform(packed, spec)
    return gradients.linear_input_gradient(
        gradient,
        slabs,
        transform["rotation_left"],
        transform["rotation_right"],
        transform["column_scale"],
        transform.get("low_rank_a"),
        unpack_low_rank_b(packed, spec) if spec.rank else None,
    )

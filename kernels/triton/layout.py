"""The layout in which all GPU kernels read the weights: chunks of columns, each a contiguous run of rows.

A chunk holds C = 256 columns (or 128) of one rotation group for all rows: `[chunks][N_padded][C / 8 bytes]`.
Within chunk t of group g, bit j of byte b is column g * group_width + C t + (C / 8) j + b, 1 = +1. So `(w >> j) & 1`
turns the bytes of a row into C / 8 neighbouring columns, and a tile of rows is one contiguous piece of memory.
Columns beyond a group and rows beyond N are 0 bits.
"""

from dataclasses import dataclass

import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.factorize import PACK_FACTOR
from torch import Tensor

ROW_MULTIPLE = 128
"""Rows are padded to whole tiles, so that no weight load needs a mask."""

_SLAB = 1024
"""Rows repacked at a time: bounds the unpacked workspace."""


@dataclass(frozen=True)
class ChunkLayout:
    """Sizes of a repacked weight.

    Attributes:
        out_features: N.
        groups: G, the number of rotation groups.
        group_width: columns of a group, a multiple of 32.
        chunk: C, columns of a chunk.
    """

    out_features: int
    groups: int
    group_width: int
    chunk: int

    @property
    def chunks_per_group(self) -> int:
        """P = ceil(group_width / C)."""
        return -(-self.group_width // self.chunk)

    @property
    def chunks(self) -> int:
        """G P."""
        return self.groups * self.chunks_per_group

    @property
    def rows(self) -> int:
        """N_padded."""
        return -(-self.out_features // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def padded(self) -> bool:
        """Whether the last chunk of a group is partly empty."""
        return self.group_width % self.chunk != 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the repacked bytes: [chunks, N_padded, C / 8]."""
        return self.chunks, self.rows, self.chunk // 8


def chunk_columns(group_width: int) -> int:
    """Return C: 128 where that divides the group width and 256 does not, else 256."""
    return 128 if group_width % 256 == 128 else 256


def chunk_layout(out_features: int, groups: int, group_width: int) -> ChunkLayout:
    """Return the layout of a weight [N, G * group_width].

    Raises:
        BackendError: sizes that the format does not allow.
    """
    if out_features < 1 or groups < 1 or group_width < 1 or group_width % PACK_FACTOR:
        raise BackendError(
            f"expected positive sizes and rotation groups of a multiple of {PACK_FACTOR} columns, found "
            f"{out_features} rows and {groups} groups of {group_width} columns"
        )
    return ChunkLayout(out_features, groups, group_width, chunk_columns(group_width))


def _to_chunks(bits: Tensor, layout: ChunkLayout) -> Tensor:
    """Pack uint8 {0, 1} [rows, G * group_width] into bytes [rows, chunks, C / 8]."""
    cells = bits.unflatten(1, (layout.groups, layout.group_width))
    spare = layout.chunks_per_group * layout.chunk - layout.group_width
    cells = torch.nn.functional.pad(cells, (0, spare))
    cells = cells.reshape(bits.shape[0], layout.chunks, 8, layout.chunk // 8)
    # Bit by bit: a sum over a strided axis would use int64.
    packed = torch.zeros_like(cells[:, :, 0])
    for j in range(8):
        packed |= cells[:, :, j] << j
    return packed


def repack_weights(packed: Tensor, layout: ChunkLayout) -> Tensor:
    """Turn `weight_packed` int32 [N, K / 32] into uint8 [chunks, N_padded, C / 8], on the same device.

    Raises:
        BackendError: the tensor does not fit the layout.
    """
    words = layout.groups * layout.group_width // PACK_FACTOR
    if packed.dtype != torch.int32 or tuple(packed.shape) != (layout.out_features, words):
        raise BackendError(
            f"expected packed signs int32 [{layout.out_features}, {words}], "
            f"found {packed.dtype} {list(packed.shape)}"
        )
    out = torch.zeros(layout.shape, dtype=torch.uint8, device=packed.device)
    shifts = torch.arange(PACK_FACTOR, dtype=torch.int32, device=packed.device)
    for start in range(0, layout.out_features, _SLAB):
        slab = packed[start : start + _SLAB]
        bits = ((slab.unsqueeze(-1) >> shifts) & 1).to(torch.uint8).flatten(1)
        out[:, start : start + slab.shape[0]] = _to_chunks(bits, layout).transpose(0, 1)
    return out


def unpack_weights(weight: Tensor, layout: ChunkLayout) -> Tensor:
    """Turn the repacked bytes back into signs int8 {-1, +1} [N, G * group_width]; the inverse, for tests."""
    shifts = torch.arange(8, dtype=torch.uint8, device=weight.device)
    bits = (weight[:, : layout.out_features].unsqueeze(-2) >> shifts.unsqueeze(-1)) & 1
    cells = bits.permute(1, 0, 2, 3).reshape(layout.out_features, layout.groups, -1)
    return (cells[..., : layout.group_width].to(torch.int8) * 2 - 1).flatten(1)


def pack_planes(q: Tensor, bits: int, layout: ChunkLayout) -> Tensor:
    """Return the bit planes of codes q int8 [M, K] in the weights' chunk layout: int32 [M, bits, chunks, C / 32].

    Two's complement: plane i < bits - 1 has weight 2^i, the last one -2^(bits-1). The input kernel writes the same
    planes; this function is for tests and for callers that only have codes.
    """
    codes = q.view(torch.uint8)
    planes = [_to_chunks((codes >> i) & 1, layout) for i in range(bits)]
    return torch.stack(planes, 1).contiguous().view(torch.int32)

"""The layout in which all GPU kernels read the weights: chunks of columns, each a contiguous run of rows.

A chunk holds C = 256 columns (or 128) of one rotation group for all rows: `[chunks][N_padded][C / 8 bytes]`.
Within chunk t of group g, bit j of byte b is column g * group_width + C t + (C / 8) j + b, 1 = +1. So `(w >> j) & 1`
turns the bytes of a row into C / 8 neighbouring columns, and a tile of rows is one contiguous piece of memory.
Columns beyond a group and rows beyond N are 0 bits.

Of a weight with P binary planes, 16 rows (what one tensor-core instruction covers) are followed by the same rows of the
next plane: `[chunks][N_padded / 16][P][16][C / 8 bytes]`. So a tile of rows with all its planes is still contiguous.
"""

from dataclasses import dataclass

import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.factorize import PACK_FACTOR
from bwla_kernels.format import LayerSpec
from torch import Tensor

ROW_MULTIPLE = 128
"""Rows are padded to whole tiles, so that no weight load needs a mask."""

TILE_ROWS = 16
"""Neighbouring rows of one plane, after which the same rows of the next plane follow."""

_SLAB = 1024
"""Rows of one plane repacked at a time: bounds the unpacked workspace."""


@dataclass(frozen=True)
class ChunkLayout:
    """Sizes of a repacked weight.

    Attributes:
        out_features: N.
        groups: G, the number of rotation groups.
        group_width: columns of a group, a multiple of 32.
        chunk: C, columns of a chunk.
        planes: P, binary planes of the weight.
    """

    out_features: int
    groups: int
    group_width: int
    chunk: int
    planes: int = 1

    @property
    def chunks_per_group(self) -> int:
        """ceil(group_width / C)."""
        return -(-self.group_width // self.chunk)

    @property
    def chunks(self) -> int:
        """Chunks of all rotation groups."""
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
        """Shape of the repacked bytes: [chunks, N_padded * P, C / 8]."""
        return self.chunks, self.rows * self.planes, self.chunk // 8

    @property
    def tiles(self) -> tuple[int, int, int, int, int]:
        """The same with the rows' axes apart: [chunks, N_padded / 16, P, 16, C / 8]."""
        return self.chunks, self.rows // TILE_ROWS, self.planes, TILE_ROWS, self.chunk // 8


def chunk_columns(group_width: int) -> int:
    """Return C: 128 where that divides the group width and 256 does not, else 256."""
    return 128 if group_width % 256 == 128 else 256


def chunk_layout(out_features: int, groups: int, group_width: int, planes: int = 1) -> ChunkLayout:
    """Return the layout of a weight [N, G * group_width] of P binary planes.

    Raises:
        BackendError: sizes that the format does not allow.
    """
    if min(out_features, groups, group_width, planes) < 1 or group_width % PACK_FACTOR:
        raise BackendError(
            f"expected positive sizes and rotation groups of a multiple of {PACK_FACTOR} columns, found "
            f"{out_features} rows of {planes} planes and {groups} groups of {group_width} columns"
        )
    return ChunkLayout(out_features, groups, group_width, chunk_columns(group_width), planes)


def layer_layout(spec: LayerSpec) -> ChunkLayout:
    """Return the layout of a layer's weight."""
    return chunk_layout(spec.out_features, spec.rotation_groups, spec.group_width, spec.planes)


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
    """Turn `weight_packed` int32 [N, K / 32], or [N, P, K / 32], into uint8 `layout.shape`, on the same device.

    Raises:
        BackendError: the tensor does not fit the layout.
    """
    words = layout.groups * layout.group_width // PACK_FACTOR
    shape: tuple[int, ...] = (layout.out_features, layout.planes, words)
    if layout.planes == 1:
        shape = (layout.out_features, words)
    if packed.dtype != torch.int32 or tuple(packed.shape) != shape:
        raise BackendError(
            f"expected packed signs int32 {list(shape)}, found {packed.dtype} {list(packed.shape)}"
        )
    out = torch.zeros(layout.tiles, dtype=torch.uint8, device=packed.device)
    shifts = torch.arange(PACK_FACTOR, dtype=torch.int32, device=packed.device)
    step = _SLAB // layout.planes // TILE_ROWS * TILE_ROWS
    for start in range(0, layout.out_features, step):
        slab = packed[start : start + step].reshape(-1, words)
        bits = ((slab.unsqueeze(-1) >> shifts) & 1).to(torch.uint8).flatten(1)
        chunks = _to_chunks(bits, layout).unflatten(0, (-1, layout.planes))
        chunks = torch.nn.functional.pad(chunks, (0, 0, 0, 0, 0, 0, 0, -chunks.shape[0] % TILE_ROWS))
        tiles = chunks.unflatten(0, (-1, TILE_ROWS)).permute(3, 0, 2, 1, 4)
        first = start // TILE_ROWS
        out[:, first : first + tiles.shape[1]] = tiles
    return out.view(layout.shape)


def unpack_weights(weight: Tensor, layout: ChunkLayout, rows: Tensor | None = None) -> Tensor:
    """Turn the repacked bytes back into signs int8 {-1, +1}: the inverse, for checks.

    Args:
        weight: uint8 `layout.shape`.
        layout: its layout.
        rows: the rows to unpack; by default all N.

    Returns: [rows, P, G * group_width].
    """
    if rows is None:
        rows = torch.arange(layout.out_features, device=weight.device)
    tiles = weight.view(layout.tiles)[:, rows // TILE_ROWS, :, rows % TILE_ROWS]  # [rows, chunks, P, C / 8]
    shifts = torch.arange(8, dtype=torch.uint8, device=weight.device)
    bits = (tiles.transpose(1, 2).unsqueeze(-2) >> shifts.unsqueeze(-1)) & 1
    cells = bits.reshape(len(rows), layout.planes, layout.groups, -1)
    return (cells[..., : layout.group_width].to(torch.int8) * 2 - 1).flatten(2)


def pack_planes(q: Tensor, bits: int, layout: ChunkLayout) -> Tensor:
    """Return the bit planes of codes q int8 [M, K] in the weights' chunk layout: int32 [M, bits, chunks, C / 32].

    Two's complement: plane i < bits - 1 has weight 2^i, the last one -2^(bits-1). The input kernel writes the same
    planes; this function is for tests and for callers that only have codes.
    """
    codes = q.view(torch.uint8)
    planes = [_to_chunks((codes >> i) & 1, layout) for i in range(bits)]
    return torch.stack(planes, 1).contiguous().view(torch.int32)

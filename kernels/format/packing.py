"""Pack signs into int32 words: bit j of word i is column 32 i + j, 1 means +1 (see docs/format.md)."""

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.factorize import PACK_FACTOR
from torch import Tensor


def pack_signs(signs: Tensor) -> Tensor:
    """Pack signs [..., K] (any real dtype; > 0 means +1, else -1) into int32 [..., K / 32].

    Raises:
        FormatError: `signs` has fewer than two axes, or K is not a multiple of 32.
    """
    if signs.dim() < 2 or signs.shape[-1] % PACK_FACTOR:
        raise FormatError(f"signs must be [N, multiple of {PACK_FACTOR}], found {tuple(signs.shape)}")
    cells = (signs > 0).unflatten(-1, (signs.shape[-1] // PACK_FACTOR, PACK_FACTOR))
    # Bit by bit, so that the workspace stays a small multiple of the words; bit 31 is the sign of the int32.
    words = torch.zeros(cells.shape[:-1], dtype=torch.int32, device=signs.device)
    for j in range(PACK_FACTOR):
        words |= cells[..., j].to(torch.int32) << j
    return words


def unpack_signs(packed: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Unpack int32 [..., K / 32] into signs [..., K] in {-1, +1} of `dtype`; the inverse of `pack_signs`.

    Raises:
        FormatError: `packed` is not int32, or has fewer than two axes.
    """
    if packed.dim() < 2 or packed.dtype != torch.int32:
        raise FormatError(f"packed signs must be an int32 matrix, found {packed.dtype} {tuple(packed.shape)}")
    signs = torch.empty(*packed.shape, PACK_FACTOR, dtype=dtype, device=packed.device)
    for j in range(PACK_FACTOR):
        signs[..., j] = ((packed >> j) & 1) * 2 - 1
    return signs.flatten(-2)

"""Functions on tensors that know nothing of quantization: chunks of rows, exact sums, samples."""

import math
from collections.abc import Iterable

import torch
from bwla_kernels.format.folder import Entry
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**20}
"""Weights handled at once: what stays in a processor's cache. Accelerators want more."""


def count_not_finite(weight: Tensor) -> int:
    """How many values of a matrix are NaN or infinite, or would be in float32."""
    return sum(part.numel() - int(torch.isfinite(part.float()).sum()) for part in split_rows(weight))


def split_rows(weight: Tensor) -> tuple[Tensor, ...]:
    """Views of consecutive rows, of about CHUNK_ELEMENTS weights each."""
    elements = CHUNK_ELEMENTS.get(weight.device.type, 2**26)
    chunks: tuple[Tensor, ...] = weight.split(max(1, elements // weight.shape[1]))
    return chunks


def in_one_buffer(parts: Iterable[Tensor], buffer: Tensor) -> tuple[Tensor, ...]:
    """Copy `parts` one behind the other into a fresh float32 `buffer`; the copies, in order, contiguous.

    What lives long is kept out of the way of the chunks that come and go, which would otherwise be
    scattered around it and more than double the memory a large group takes.
    """
    copies, first = [], 0
    for part in parts:
        copies.append(buffer[first : first + part.numel()].view(part.shape).copy_(part))
        first += part.numel()
    return tuple(copies)


def sum_in_double(parts: Iterable[Tensor]) -> Tensor:
    """Sum of tensors of one shape in float64, one at a time."""
    remaining = iter(parts)
    total = next(remaining).double().clone()
    for part in remaining:
        total += part
    return total


def row_rms(rows: Tensor) -> Tensor:
    """Root mean square of each row of [N, K], float64 [N]; 1 for a row of zeros."""
    rms = rows.double().square().mean(1).sqrt()
    return torch.where(rms > 0, rms, torch.ones_like(rms))


SAMPLE_ELEMENTS = 2**21
"""Values looked at of a larger matrix: whole rows, evenly spaced, so that any layer costs about a second."""


def sample_rows(rows: Tensor, limit: int = SAMPLE_ELEMENTS) -> Tensor:
    """Evenly spaced rows of [N, K], at least one, `limit` values at most; `rows` itself where that is all."""
    wanted = max(1, limit // rows.shape[1])
    if len(rows) <= wanted:
        return rows
    return rows[torch.arange(wanted, device=rows.device) * len(rows) // wanted]


def entry_bytes(entry: Entry) -> int:
    """Bytes of one stored tensor."""
    return math.prod(entry.shape) * entry.dtype.itemsize

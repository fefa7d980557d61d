"""Tensor functions that are not specific to quantization: row chunks, exact sums, subspace iteration, sizes."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from bwla_kernels.format.files import Entry
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**20}
"""Elements processed at a time, by device type: on a CPU, what fits into its cache."""

ACCELERATOR_CHUNK_ELEMENTS = 2**26
"""The same for all other devices."""

SAMPLE_ELEMENTS = 2**21
"""Elements of a matrix that statistics look at: about a second's work, however large the layer is."""

OVERSAMPLING = 8
"""Directions that subspace iteration carries beyond the requested rank; they speed up its convergence."""


def split_rows(weight: Tensor) -> tuple[Tensor, ...]:
    """Return views of consecutive rows of [N, K], each of about `CHUNK_ELEMENTS` elements."""
    elements = CHUNK_ELEMENTS.get(weight.device.type, ACCELERATOR_CHUNK_ELEMENTS)
    chunks: tuple[Tensor, ...] = weight.split(max(1, elements // weight.shape[1]))
    return chunks


def count_not_finite(weight: Tensor) -> int:
    """Count the values of a matrix that are NaN or infinite, or would be in float32."""
    return sum(part.numel() - int(torch.isfinite(part.float()).sum()) for part in split_rows(weight))


def in_one_buffer(parts: Iterable[Tensor], buffer: Tensor) -> tuple[Tensor, ...]:
    """Copy `parts` one after the other into a flat `buffer` and return views of the copies, in order.

    Long-lived tensors in one allocation do not fragment the heap between short-lived chunks, which would more than
    double the memory that a large group takes.
    """
    copies, first = [], 0
    for part in parts:
        copies.append(buffer[first : first + part.numel()].view(part.shape).copy_(part))
        first += part.numel()
    return tuple(copies)


def sum_in_double(parts: Iterable[Tensor]) -> Tensor:
    """Sum tensors of one shape in float64, one at a time."""
    remaining = iter(parts)
    total = next(remaining).double().clone()
    for part in remaining:
        total += part
    return total


def row_rms(rows: Tensor) -> Tensor:
    """Return the root mean square of each row of [N, K], float64 [N]; 1 for a row of zeros."""
    rms = rows.double().square().mean(1).sqrt()
    return torch.where(rms > 0, rms, torch.ones_like(rms))


def sample_rows(rows: Tensor, limit: int = SAMPLE_ELEMENTS) -> Tensor:
    """Return evenly spaced rows of [N, K]: at most `limit` elements, but at least one row."""
    count = max(1, limit // rows.shape[1])
    if len(rows) <= count:
        return rows
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]


def subspace_iteration(
    apply: Callable[[Tensor], Tensor],
    gram: Callable[[Tensor], Tensor],
    basis: Tensor,
    iterations: int,
    rank: int | None = None,
) -> Tensor:
    """Approximate the leading eigenvectors of a positive semidefinite operator P.

    Subspace iteration followed by a Rayleigh-Ritz step (Halko, Martinsson, Tropp, arXiv 0909.4061). Orthogonalization
    is computed in the dtype that `apply` returns.

    Args:
        apply: X [K, q] -> P X.
        gram: X [K, q] -> X^T P X, float64 [q, q].
        basis: initial subspace, orthonormal columns, float32 [K, q].
        iterations: number of applications of P before the Rayleigh-Ritz step; at least 1.
        rank: number of vectors to return, q by default.

    Returns: orthonormal columns, float32 [K, rank], in order of decreasing eigenvalue. They capture at least as much
        of P as the first columns of the initial basis.
    """
    dtype = basis.dtype
    for _ in range(iterations):
        image = apply(basis)
        dtype = image.dtype
        basis = torch.linalg.qr(image).Q.float()
    ritz_vectors = torch.linalg.eigh(gram(basis)).eigenvectors.flip(-1)[:, :rank].to(dtype)
    leading: Tensor = torch.linalg.qr(basis.to(dtype) @ ritz_vectors).Q.float()
    return leading


def tensor_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the size in bytes of a tensor of this shape and dtype."""
    return math.prod(shape) * dtype.itemsize


def entry_bytes(entry: Entry) -> int:
    """Return the size in bytes of a tensor in a checkpoint."""
    return tensor_bytes(entry.shape, entry.dtype)

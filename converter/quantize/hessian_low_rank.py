"""The low-rank part that saves most output error: minimise tr((E - B A) H (E - B A)^T) over rank r.

With H = L L^T that is the truncated SVD of E L. Only its left singular vectors U are needed, since the best factors
are B = U and A = U^T E; they come from randomized subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061) with
products by E and H alone, so no eigendecomposition of H is needed, whatever its width.
"""

import torch
from torch import Tensor

OVERSAMPLE = 8
ITERATIONS = 6


def hessian_low_rank(
    error: Tensor, hessian: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Factors B [N, r] with orthonormal columns and A [r, K], float32.

    Args:
        error: E, float32 [N, K].
        hessian: H, [K, K].
        rank: r <= min(N, K); 0 gives empty factors.
        generator: source of the first subspace, on the CPU.
    """
    rows, columns = error.shape
    if rank == 0:
        return error.new_zeros(rows, 0), error.new_zeros(0, columns)
    width = min(rank + OVERSAMPLE, rows, columns)
    basis = torch.linalg.qr(torch.randn(rows, width, generator=generator).to(error.device)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(error @ (hessian @ (error.mT @ basis))).Q
    seen = error.mT @ basis
    gram = (seen.mT @ (hessian @ seen)).double()
    turn = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :rank].float()
    b = torch.linalg.qr(basis @ turn).Q
    return b, b.mT @ error

"""Low-rank correction with the smallest output error: minimize tr((E - B A) H (E - B A)^T) over rank r.

With H = L L^T, the solution is the truncated SVD of E L. Only its left singular vectors U are needed, because the
optimal factors are B = U and A = U^T E. Subspace iteration finds U with products by E and H alone, so H is never
decomposed, whatever its size.
"""

import torch
from bwla_converter.common.tensors import OVERSAMPLING, subspace_iteration
from torch import Tensor

SUBSPACE_ITERATIONS = 6


def hessian_low_rank(
    error: Tensor, hessian: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the factors B [N, r] with orthonormal columns and A [r, K], float32.

    Args:
        error: E, float32 [N, K].
        hessian: H, float32 [K, K].
        rank: r <= min(N, K); 0 returns empty factors.
        generator: source of the initial subspace, on the CPU.
    """
    rows, columns = error.shape
    if rank == 0:
        return error.new_zeros(rows, 0), error.new_zeros(0, columns)

    def gram(x: Tensor) -> Tensor:
        projected = error.mT @ x
        return (projected.mT @ (hessian @ projected)).double()

    width = min(rank + OVERSAMPLING, rows, columns)
    basis = torch.linalg.qr(torch.randn(rows, width, generator=generator).to(error.device)).Q
    b = subspace_iteration(
        lambda x: error @ (hessian @ (error.mT @ x)), gram, basis, SUBSPACE_ITERATIONS, rank
    )
    return b, b.mT @ error

"""Matrix products of the sign search, in bfloat16 where the processor multiplies that much faster.

Signs are exact in bfloat16. The matrix is rounded where a product only decides between signs: what depends on 2^-9 of
its elements hardly changes the error. Where a product gives the error itself, the matrix is the sum of two parts in
bfloat16, exact up to 2^-17 of each element. Sums are float32. A GPU rounds to TF32, which is finer.
"""

import torch
from bwla_kernels.precision import fast_products, has_fast_bfloat16
from torch import Tensor

PRODUCT_ROWS = 1024
"""Rows of the matrix that are split into two parts at a time."""


def rounded_product(matrix: Tensor, rows: Tensor) -> Tensor:
    """Return `matrix` [R, K] @ `rows`^T with `rows` [N, K], float32 [R, N], of operands that may be rounded."""
    with fast_products(matrix.device):
        return matrix @ rows.mT


def sign_product(matrix: Tensor, signs: Tensor) -> Tensor:
    """Return `matrix` [R, K] @ `signs`^T with `signs` [N, K], float32 [R, N], with nearly all bits of the matrix."""
    if not has_fast_bfloat16(matrix.device):
        return matrix @ signs.mT
    product = matrix.new_empty(len(matrix), len(signs))
    for part, out in zip(matrix.split(PRODUCT_ROWS), product.split(PRODUCT_ROWS), strict=True):
        high = part.bfloat16().float()
        sums = rounded_product(torch.cat([high, part - high]), signs)
        torch.add(sums[: len(part)], sums[len(part) :], out=out)
    return product


def row_major(sign: Tensor) -> Tensor:
    """Return signs [K, C, N] as [C N, K], contiguous."""
    return sign.flatten(1).mT.contiguous()

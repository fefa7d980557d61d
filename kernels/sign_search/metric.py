"""The output error of a row and its triangular form, in which GPTQ is a greedy choice of one sign after another.

With H = M diag(d) M^T, M unit upper triangular, the error of the signs s with scale a for the row w is

    f(s) = (w - a s) H (w - a s)^T = sum_j d_j (p_j - a q_j)^2,   p = w M,   q = s M,   q_j = s_j + sum_{i<j} s_i M_ij.

Only the terms from j on depend on s_j. GPTQ's error feedback (arXiv 2210.17323; as the nearest plane algorithm: arXiv
2507.18553) chooses s_j for the smallest j-th term, for j = 0, 1, ...: p_j - a sum_{i<j} s_i M_ij is the weight to which
all earlier errors have been fed back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """The Hessian of the output error and its factors.

    Attributes:
        hessian: H, positive definite, float32 [K, K].
        factor: M, unit upper triangular, float32 [K, K].
        pivots: d, positive, float32 [K].
    """

    hessian: Tensor
    factor: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> "Metric":
        """Factorize H, float32 [K, K]. The factorization is computed in float64.

        Raises:
            torch.linalg.LinAlgError: H is not positive definite.
        """
        # The Cholesky factor of H in reverse order is lower triangular, so that it is upper triangular in H's order.
        upper = torch.linalg.cholesky(hessian.double().flip(0, 1)).flip(0, 1)
        roots = upper.diagonal().clone()
        return cls(hessian, upper.div_(roots).float(), roots.square().float())

    def scaled(self, column: Tensor) -> "Metric":
        """Return the metric of inputs multiplied by `column`, float32 [K]: no new factorization is needed."""
        outer = column.unsqueeze(1)
        return Metric(
            outer * self.hessian * column, outer * self.factor / column, self.pivots * column.square()
        )


@dataclass(frozen=True)
class Target:
    """The weight that is to be binarized.

    Attributes:
        weight: W, float32 [N, K].
        hessian_product: H W^T, float32 [K, N]: transposed, a row of W is a column.
    """

    weight: Tensor
    hessian_product: Tensor

    @classmethod
    def of(cls, weight: Tensor, metric: Metric) -> "Target":
        """Multiply W, float32 [N, K], in float32."""
        return cls(weight, metric.hessian @ weight.mT)

    def scaled(self, column: Tensor) -> "Target":
        """Return the target in the metric `Metric.scaled(column)`: W is divided by `column`, float32 [K]."""
        return Target(self.weight / column, self.hessian_product * column.unsqueeze(1))

    def minus(self, low_rank_b: Tensor, low_rank_a: Tensor, metric: Metric) -> "Target":
        """Return the target W - B A with B float32 [N, r] and A float32 [r, K]; H W^T is not computed anew."""
        return Target(
            torch.addmm(self.weight, low_rank_b, low_rank_a, alpha=-1.0),
            torch.addmm(self.hessian_product, metric.hessian @ low_rank_a.mT, low_rank_b.mT, alpha=-1.0),
        )

    def norms(self) -> Tensor:
        """Return w H w^T of each row, float32 [N]."""
        return (self.weight.mT * self.hessian_product).sum(0)

    def rows(self, begin: int, end: int) -> "Target":
        """Return some rows, contiguous."""
        return Target(self.weight[begin:end], self.hessian_product[:, begin:end].contiguous())

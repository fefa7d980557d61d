"""Second moments of an input group's inputs, which give the Hessian of its output error.

For an output y = W x, E||dW x||^2 = tr(dW H dW^T) with H = E[x x^T]: up to a factor, the Hessian of OBS and of GPTQ
(arXiv 2210.17323).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from bwla_kernels.errors import SourceError
from bwla_kernels.reference import rotate
from torch import Tensor

GRAM_BLOCKS, SMALLEST_GRAM_BLOCK = 8, 512
"""Blocks into which a Gram matrix is divided, and the smallest width for which that saves time."""


@dataclass
class Moments:
    """Gram matrices of an input group's inputs, accumulated batch by batch, float32 on one device.

    Attributes:
        gram: sum of x_hat x_hat^T [K, K] over the inputs x_hat in the quantized model.
        cross_gram: sum of x x_hat^T [K, K] with the inputs x in the original model; None if they are not recorded.
        error_cross_gram: sum of e x_hat^T [N, K], where e is the wanted output minus W x_hat; None if not recorded.
        count: number of tokens.
        parts: where each linear of the group has inputs of its own (the down projections of experts), its moments by
            its full name; the others are their sums.
        starved: those linears that few tokens reached, so that `parts` also has other tokens for them.
    """

    gram: Tensor
    cross_gram: Tensor | None
    error_cross_gram: Tensor | None = None
    count: int = 0
    parts: Mapping[str, "Moments"] = field(default_factory=dict)
    starved: tuple[str, ...] = ()

    @classmethod
    def zeros(cls, width: int, device: torch.device, cross_gram: bool) -> "Moments":
        """Return the moments of no inputs, of `width` K; with `cross_gram`, those of the original are recorded too."""
        gram = torch.zeros(width, width, device=device)
        return cls(gram, torch.zeros_like(gram) if cross_gram else None)

    def add(self, x_hat: Tensor, x: Tensor | None = None) -> None:
        """Add a batch of inputs [..., K] and the original model's inputs for the same tokens."""
        x_hat = x_hat.flatten(0, -2).float()
        add_gram(self.gram, x_hat)
        if self.cross_gram is not None and x is not None:
            self.cross_gram.addmm_(x.flatten(0, -2).float().mT, x_hat)
        self.count += len(x_hat)

    def include(self, other: "Moments") -> None:
        """Add the moments of further tokens; both record the same."""
        self.gram += other.gram
        if self.cross_gram is not None and other.cross_gram is not None:
            self.cross_gram += other.cross_gram
        self.count += other.count

    def add_error(self, x_hat: Tensor, error: Tensor) -> None:
        """Add the wanted outputs minus W x_hat, [..., N], for the tokens of the last `add`."""
        batch = error.flatten(0, -2).float().mT @ x_hat.flatten(0, -2).float()
        self.error_cross_gram = batch if self.error_cross_gram is None else self.error_cross_gram.add_(batch)

    def hessian(self, damping: float) -> Tensor:
        """Return E[x_hat x_hat^T], float32 [K, K], with `damping` times the mean of its diagonal added to the diagonal.

        Raises:
            SourceError: there were no inputs, all were zero, or one was not finite.
        """
        mean = self.gram / max(self.count, 1)
        level = mean.diagonal().mean()
        if self.count == 0 or not bool(torch.isfinite(level)) or level <= 0:
            raise SourceError(
                f"calibration: expected finite, nonzero inputs, found {self.count} tokens with a mean square of "
                f"{float(level):g}: either the model overflows in its dtype or the calibration text is empty"
            )
        return mean + damping * level * torch.eye(len(mean), device=mean.device)


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x with x [M, K] to a symmetric matrix: the blocks above the diagonal are copied to below it."""
    columns = len(gram)
    width = max(SMALLEST_GRAM_BLOCK, -(-columns // GRAM_BLOCKS))
    for begin in range(0, columns, width):
        end = min(begin + width, columns)
        gram[begin:end, begin:].addmm_(x[:, begin:end].mT, x[:, begin:])
        gram[end:, begin:end] = gram[begin:end, end:].mT


def rotate_hessian(hessian: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return H in the rotated basis, float32 [K, K]."""
    half = rotate(hessian, left, right)
    return rotate(half.mT.contiguous(), left, right)

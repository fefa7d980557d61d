"""What a group's inputs look like: H = E[x x^T], the metric in which errors of its weights cost output error.

For an output y = W x, E||dW x||^2 = tr(dW H dW^T): the Hessian of GPTQ (arXiv 2210.17323) and OBS, up to a factor.
"""

from dataclasses import dataclass

import torch
from bwla_kernels.errors import SourceError
from bwla_kernels.reference import rotate
from torch import Tensor


@dataclass
class Moments:
    """Running second moments of a stream of inputs, float32 on one device.

    Attributes:
        gram: sum of x_hat x_hat^T [K, K], over the inputs that the quantized blocks produce.
        cross_gram: sum of x x_hat^T [K, K] with the original model's inputs x; None where they are not followed.
        residual_cross_gram: sum of (h - h_hat) x_hat^T [N, K], with h and h_hat the residual stream that the output is
            added to, in the original model and in the quantized one; None where it is not followed.
        count: tokens.
    """

    gram: Tensor
    cross_gram: Tensor | None
    residual_cross_gram: Tensor | None = None
    count: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device, cross_gram: bool) -> "Moments":
        """Nothing seen yet."""
        gram = torch.zeros(width, width, device=device)
        return cls(gram, torch.zeros_like(gram) if cross_gram else None)

    def add(self, x_hat: Tensor, x: Tensor | None = None) -> None:
        """Count a batch of inputs [M, K], and the original model's at the same places."""
        x_hat = x_hat.flatten(0, -2).float()
        self.gram.addmm_(x_hat.mT, x_hat)
        if self.cross_gram is not None and x is not None:
            self.cross_gram.addmm_(x.flatten(0, -2).float().mT, x_hat)
        self.count += len(x_hat)

    def add_residual(self, x_hat: Tensor, stream_hat: Tensor, stream: Tensor) -> None:
        """Count how far the stream [M, N] has come from the original's at the inputs of the last `add`."""
        gap = (stream.float() - stream_hat.float()).flatten(0, -2)
        found = gap.mT @ x_hat.flatten(0, -2).float()
        self.residual_cross_gram = (
            found if self.residual_cross_gram is None else self.residual_cross_gram.add_(found)
        )

    def hessian(self, damping: float) -> Tensor:
        """E[x_hat x_hat^T] with `damping` times its mean diagonal added to the diagonal.

        Raises:
            SourceError: no input was seen, or one was not finite.
        """
        mean = self.gram / max(self.count, 1)
        level = mean.diagonal().mean()
        if self.count == 0 or not bool(torch.isfinite(level)) or level <= 0:
            raise SourceError(
                f"calibration: expected finite inputs that are not all zero, found {self.count} tokens with a "
                f"mean square of {float(level):g}: the model overflows in this dtype, or the text is empty"
            )
        return mean + damping * level * torch.eye(len(mean), device=mean.device)


def rotate_hessian(hessian: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """H in the rotated basis, float32 [K, K]."""
    half = rotate(hessian, left, right)
    return rotate(half.mT.contiguous(), left, right)

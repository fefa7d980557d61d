"""The sign search: error feedback from several initial scales, then coordinate descent from the best results.

GPTQ's error feedback with one-bit codes chooses the signs column by column; coordinate descent then flips single signs
as long as the error falls. The ops of `steps` decide; around them are matrix products. Which initial scale leads to the
smallest final error is not known in advance, so several candidates of a row take part, fewer in every stage.
"""

from dataclasses import dataclass

import torch
from bwla_kernels.sign_search.feedback import gptq_signs
from bwla_kernels.sign_search.metric import Metric, Target
from bwla_kernels.sign_search.planes import search_planes
from bwla_kernels.sign_search.products import rounded_product, row_major, sign_product
from torch import Tensor


def row_chunk_elements(device: str) -> int:
    """Return how many weights to binarize at a time on a device type; that takes 18 times their memory.

    A GPU needs many rows to be busy.
    """
    return 2**25 if device == "cpu" else 2**27


@dataclass(frozen=True)
class Effort:
    """How thoroughly to search.

    Attributes:
        scale_factors: initial row scales for error feedback, in units of the row's mean magnitude. Empty: no error
            feedback, the signs are the weight's own.
        stages: (number of candidates, sweeps): the best candidates of each row go through that many sweeps.
        plane_factors: initial scales for several planes, in units of `planes.INITIAL_SCALES` times the row's rms.
        exact: compute scales and errors without rounding at the end; otherwise they are as good as the search had them.
    """

    scale_factors: tuple[float, ...]
    stages: tuple[tuple[int, int], ...]
    exact: bool = True
    plane_factors: tuple[float, ...] = (1.0,)

    @property
    def plane_sweeps(self) -> int:
        """Return the sweeps that the best candidate of each row goes through."""
        return sum(sweeps for _, sweeps in self.stages)

    @property
    def products(self) -> float:
        """Return the number of matrix products of N K^2 multiplications, without those of sweeps."""
        candidates, total = max(1, len(self.scale_factors)), 0.0
        if self.scale_factors:
            total = 0.5 * (1 + candidates)  # triangular
        first = self.stages[0] if self.stages else (0, 0)
        return total + min(candidates, first[0]) + 2 * self.exact

    @property
    def sweeps(self) -> float:
        """Return the number of sweeps over all weights, one for each candidate."""
        candidates, total = max(1, len(self.scale_factors)), 0
        for most, sweeps in self.stages:
            candidates = min(candidates, most)
            total += candidates * sweeps
        return total


@dataclass(frozen=True)
class BinaryWeight:
    """The signs of P planes, each with one scale per row.

    Attributes:
        sign: float32 [N, P, K], -1 or +1.
        scale: float32 [N, P], positive, in descending order.
        error: f of each row, float32 [N].
    """

    sign: Tensor
    scale: Tensor
    error: Tensor

    def dequantize(self) -> Tensor:
        """Return the sum over the planes of diag(scale) sign, float32 [N, K]."""
        total = self.scale[:, :1] * self.sign[:, 0]
        for plane in range(1, self.scale.shape[1]):
            total.addcmul_(self.scale[:, plane : plane + 1], self.sign[:, plane])
        return total


@dataclass
class Candidates:
    """C binary weights for each of N rows during the search, transposed.

    Attributes:
        sign: s, float32 [K, C, N].
        dots: s H w^T, float32 [C, N].
        norms: s H s^T, float32 [C, N].
        product: H s, float32 [K, C, N] but for `change`; None before coordinate descent.
        change: what the last sweep added to the signs, float32 [K, C, N].
    """

    sign: Tensor
    dots: Tensor
    norms: Tensor
    product: Tensor | None = None
    change: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """Return the scales with the smallest errors, s H w^T / s H s^T, kept positive, float32 [C, N]."""
        return (self.dots / self.norms).clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def gain(self) -> Tensor:
        """Return w H w^T - f with the best scales, float32 [C, N]."""
        return self.scale * (2.0 * self.dots - self.scale * self.norms)

    def best(self, count: int) -> "Candidates":
        """Return the `count` best candidates of each row; the order of equally good ones is kept."""
        if count >= len(self.dots):
            return self
        index = self.gain.argsort(dim=0, descending=True, stable=True)[:count]

        def select(tensor: Tensor) -> Tensor:
            return tensor.gather(1, index.expand(len(tensor), -1, -1))

        return Candidates(
            select(self.sign),
            self.dots.gather(0, index),
            self.norms.gather(0, index),
            None if self.product is None else select(self.product),
            None if self.change is None else select(self.change),
        )


def gptq_binarize(target: Target, metric: Metric, effort: Effort, planes: int = 1) -> BinaryWeight:
    """Binarize a weight with a small output error, a chunk of its rows at a time.

    Args:
        target: the weight.
        metric: what the error is measured with.
        effort: how thoroughly to search.
        planes: the number of sign matrices whose scaled sum approximates the weight.
    """
    rows, columns = target.weight.shape
    chunk = max(1, row_chunk_elements(target.weight.device.type) // (columns * planes))
    parts = [
        _binarize_rows(target.rows(begin, begin + chunk), metric, effort, planes)
        for begin in range(0, rows, chunk)
    ]
    return BinaryWeight(
        torch.cat([part.sign for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.error for part in parts]),
    )


def _binarize_rows(target: Target, metric: Metric, effort: Effort, planes: int) -> BinaryWeight:
    if planes > 1:
        return BinaryWeight(*search_planes(target, metric, planes, effort.plane_factors, effort.plane_sweeps))
    candidates = (
        error_feedback(target, metric, effort.scale_factors)
        if effort.scale_factors
        else _evaluated(own_signs(target), target, metric)
    )
    for count, sweeps in effort.stages:
        candidates = candidates.best(count)
        candidates = coordinate_descent(candidates, target, metric, sweeps)
    # The products have served their purpose: only signs, scales and errors are selected.
    candidates = Candidates(candidates.sign, candidates.dots, candidates.norms).best(1)
    if effort.exact:
        candidates = _evaluated(candidates.sign, target, metric)
    error = target.norms() - candidates.gain[0]
    return BinaryWeight(
        candidates.sign.permute(2, 1, 0).contiguous(), candidates.scale.mT.contiguous(), error
    )


def own_signs(target: Target) -> Tensor:
    """Return the signs of the weight itself, float32 [K, 1, N]."""
    return torch.where(target.weight.mT.contiguous() >= 0, 1.0, -1.0).unsqueeze(1)


def error_feedback(target: Target, metric: Metric, scale_factors: tuple[float, ...]) -> Candidates:
    """Choose signs column by column, see `metric`; one candidate for each initial scale."""
    mean = target.weight.abs().mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.stack([factor * mean for factor in scale_factors])
    dots, norms = torch.zeros_like(scale), torch.zeros_like(scale)
    sign = gptq_signs(torch.ops.bwla.choose_signs, target, metric, scale, dots, norms)
    return Candidates(sign, dots, norms)


def coordinate_descent(candidates: Candidates, target: Target, metric: Metric, sweeps: int) -> Candidates:
    """Sweep through the signs; after each sweep the scales are fitted anew. May change `candidates` in place."""
    if not sweeps:
        return candidates
    if candidates.product is None:
        product = rounded_product(metric.hessian, row_major(candidates.sign))
        candidates = _fitted(candidates.sign, product.view_as(candidates.sign), target)
    if candidates.change is None:
        candidates.change = torch.zeros_like(candidates.sign)
    for _ in range(sweeps):
        torch.ops.bwla.sweep_signs(
            target.hessian_product,
            candidates.product,
            metric.hessian,
            candidates.scale,
            candidates.sign,
            candidates.change,
            candidates.dots,
            candidates.norms,
        )
    return candidates


def _evaluated(sign: Tensor, target: Target, metric: Metric) -> Candidates:
    """Return candidates with the signs [K, C, N] and everything that they have without rounding."""
    product = sign_product(metric.hessian, row_major(sign))
    return _fitted(sign, product.view_as(sign), target)


def _fitted(sign: Tensor, product: Tensor, target: Target) -> Candidates:
    """Return candidates with signs s and H s, both [K, C, N]."""
    dots = torch.stack([(candidate * target.hessian_product).sum(0) for candidate in sign.unbind(1)])
    norms = torch.stack([(s * hs).sum(0) for s, hs in zip(sign.unbind(1), product.unbind(1), strict=True)])
    return Candidates(sign, dots, norms, product)

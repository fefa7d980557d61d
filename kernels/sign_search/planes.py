"""The search for several planes: error feedback over the levels of a row, coordinate descent, scales by least squares.

The scales of a row minimize its error for given signs: a = G^-1 b with G_pq = s_p H s_q^T and b_p = s_p H w^T. They are
refitted after each pass. As for a single plane, error feedback starts from several initial scales, and the best result
of each row goes through coordinate descent.
"""

from dataclasses import dataclass

import torch
from bwla_kernels.sign_search.feedback import gptq_signs
from bwla_kernels.sign_search.levels import choose_levels, sweep_levels
from bwla_kernels.sign_search.metric import Metric, Target
from bwla_kernels.sign_search.products import rounded_product, row_major, sign_product
from torch import Tensor

INITIAL_SCALES = {2: (0.981, 0.529), 3: (1.172, 0.586, 0.293), 4: (1.340, 0.670, 0.335, 0.1675)}
"""Scales of good quantizers of a Gaussian with unit variance, by the number of planes (Max, 1960): the best for two
planes, the best uniform ones for more."""

RIDGE = 1e-6
"""Added to G in units of its mean diagonal: planes with nearly the same signs share a scale."""


@dataclass
class PlaneWeight:
    """Signs of P planes for N rows during the search, transposed.

    Attributes:
        sign: s, float32 [K, P, N].
        dots: s_p H w^T, float32 [P, N].
        norms: s_p H s_q^T, float32 [P, P, N].
    """

    sign: Tensor
    dots: Tensor
    norms: Tensor

    @property
    def scale(self) -> Tensor:
        """Return the scales with the smallest errors, float32 [P, N]; they may be negative."""
        gram = self.norms.permute(2, 0, 1).double()
        level = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        gram = gram + RIDGE * level[:, None, None] * torch.eye(len(self.dots), device=gram.device)
        solved: Tensor = torch.linalg.solve(gram, self.dots.mT.double().unsqueeze(2))
        return solved[..., 0].mT.float().contiguous()

    def gain(self, scale: Tensor) -> Tensor:
        """Return w H w^T - f with these scales [P, N], float32 [N]."""
        return (scale * (2.0 * self.dots - (self.norms * scale).sum(1))).sum(0)

    def better(self, other: "PlaneWeight") -> "PlaneWeight":
        """Return the better of two for each row."""
        chosen = self.gain(self.scale) >= other.gain(other.scale)
        return PlaneWeight(
            torch.where(chosen, self.sign, other.sign),
            torch.where(chosen, self.dots, other.dots),
            torch.where(chosen, self.norms, other.norms),
        )


def search_planes(
    target: Target, metric: Metric, planes: int, scale_factors: tuple[float, ...], sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Search for the signs of all planes of some rows.

    Args:
        target: the rows.
        metric: what the error is measured with.
        planes: P, 2 to 4.
        scale_factors: initial scales for error feedback, in units of `INITIAL_SCALES` times the row's rms.
        sweeps: sweeps of coordinate descent.

    Returns: signs float32 [N, P, K], positive scales [N, P] in descending order, and errors f [N].
    """
    rms = target.weight.square().mean(1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    initial = torch.tensor(INITIAL_SCALES[planes], device=rms.device).unsqueeze(1) * rms
    found: PlaneWeight | None = None
    for factor in scale_factors:
        tried = error_feedback(target, metric, factor * initial)
        found = tried if found is None else found.better(tried)
    assert found is not None
    found = coordinate_descent(found, target, metric, sweeps)
    exact = _evaluated(found.sign, sign_product(metric.hessian, row_major(found.sign)), target)
    scale = exact.scale
    error = target.norms() - exact.gain(scale)
    return *_sorted(exact.sign, scale), error


def error_feedback(target: Target, metric: Metric, scale: Tensor) -> PlaneWeight:
    """Choose signs column by column from the initial scales, float32 [P, N]."""
    planes, rows = scale.shape
    dots, norms = torch.zeros_like(scale), scale.new_zeros(planes, planes, rows)
    sign = gptq_signs(choose_levels, target, metric, scale, dots, norms)
    return PlaneWeight(sign, dots, norms)


def coordinate_descent(start: PlaneWeight, target: Target, metric: Metric, sweeps: int) -> PlaneWeight:
    """Sweep through the columns; before each sweep the scales are fitted anew. Changes `start` in place."""
    if not sweeps:
        return start
    product = rounded_product(metric.hessian, row_major(start.sign)).view_as(start.sign)
    state, change = _evaluated(start.sign, product, target), torch.zeros_like(start.sign)
    for _ in range(sweeps):
        sweep_levels(
            target.hessian_product,
            product,
            metric.hessian,
            state.scale,
            state.sign,
            change,
            state.dots,
            state.norms,
        )
    return state


def _evaluated(sign: Tensor, product: Tensor, target: Target) -> PlaneWeight:
    """Return the planes with signs s [K, P, N] and H s."""
    product = product.view_as(sign)
    dots = torch.stack([(plane * target.hessian_product).sum(0) for plane in sign.unbind(1)])
    norms = torch.stack(
        [torch.stack([(plane * other).sum(0) for other in product.unbind(1)]) for plane in sign.unbind(1)]
    )
    return PlaneWeight(sign, dots, (norms + norms.transpose(0, 1)) / 2)


def _sorted(sign: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return signs [K, P, N] as [N, P, K] and scales [P, N] as [N, P], positive and in descending order."""
    negative = scale < 0
    positive = scale.abs().clamp_min(torch.finfo(torch.float32).tiny)
    order = positive.mT.argsort(dim=1, descending=True, stable=True)
    signs = torch.where(negative, -sign, sign).permute(2, 1, 0)
    sorted_signs = signs.gather(1, order.unsqueeze(2).expand(-1, -1, signs.shape[2]))
    return sorted_signs.contiguous(), positive.mT.gather(1, order).contiguous()

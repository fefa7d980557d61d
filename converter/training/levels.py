"""Straight-through training of weights with several binary planes: levels of a row, latent weights, and their product.

A row with the scales alpha_p has 2^P levels sum_p +-alpha_p. In the forward pass a latent weight counts as the level
nearest to it. In the backward pass it gets the gradient of the identity within the range of the levels, as in LSQ
(arXiv 1902.08153), and the scales get their gradients through the product, for the levels that were chosen.

Latent weights are in units of half the mean distance between neighboring levels, (sum_p alpha_p) / (2^P - 1). One plane
would have the levels -1 and +1 in these units, and the outermost levels are always 2^P - 1 from zero, so learning
rates and ranges mean the same for any number of planes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bwla_kernels.precision import product_dtype
from torch import Tensor

MARGIN = 0.05
"""Distance from the ends of its level's cell at which a latent weight starts where another level would be nearer."""


@dataclass(frozen=True)
class Levels:
    """The levels of some rows that are not negative, in ascending order; the others are their mirror image.

    Attributes:
        unit: half the mean distance between levels, float32 [N, 1].
        values: levels, float32 [N, 2^(P-1)].
        signs: their signs, float32 [N, 2^(P-1), P].
        thresholds: the midpoints between neighboring levels, in units of `unit`, float32 [N, 2^(P-1) - 1].
    """

    unit: Tensor
    values: Tensor
    signs: Tensor
    thresholds: Tensor

    @classmethod
    def of(cls, scale: Tensor) -> "Levels":
        """Compute the levels of rows with the scales [N, P]."""
        planes = scale.shape[1]
        unit = level_unit(scale)
        codes = torch.arange(2 ** (planes - 1), device=scale.device).unsqueeze(1)
        bits = codes >> torch.arange(planes, device=scale.device) & 1  # the last plane's is 0
        signs = 1.0 - 2.0 * bits.to(scale.dtype)
        values = (scale.unsqueeze(1) * signs).sum(2)  # not a matrix product, which may run in bfloat16
        order = values.abs().argsort(dim=1, stable=True)
        mirrored = torch.where(values < 0, -1.0, 1.0).gather(1, order)
        values = values.abs().gather(1, order)
        middles = (values[:, 1:] + values[:, :-1]) / (2.0 * unit)
        return cls(unit, values, signs[order] * mirrored.unsqueeze(2), middles)

    @property
    def bound(self) -> int:
        """Magnitude that latent weights keep to, 2^P: the cells of the outermost levels end there."""
        return 2 * self.values.shape[1]

    def weights(self, latent: Tensor) -> Tensor:
        """Return the level nearest to each latent weight [N, K]."""
        steps = self.values.diff(dim=1)
        result = self.values[:, :1].expand_as(latent).clone()
        for index, above in enumerate(self._above(latent)):
            result.addcmul_(above, steps[:, index : index + 1])
        result.copysign_(latent)
        return result

    def plane_signs(self, latent: Tensor) -> Tensor:
        """Return the signs of these levels, int8 [N, P, K]."""
        steps = self.signs.diff(dim=1).unsqueeze(3)
        result = self.signs[:, 0].unsqueeze(2).repeat(1, 1, latent.shape[1])
        for index, above in enumerate(self._above(latent)):
            result.addcmul_(above.unsqueeze(1), steps[:, index])
        return (result * _direction(latent).unsqueeze(1)).to(torch.int8)

    def scale_gradient(self, latent: Tensor, weight_gradient: Tensor) -> Tensor:
        """Return sum_k s_pk G_k for the signs s of these levels and the gradient G [N, K] of the weights: [N, P]."""
        outwards = weight_gradient * _direction(latent)
        sums = [outwards.sum(1)]
        sums += [(above * outwards).sum(1) for above in self._above(latent)]
        above_threshold = torch.stack([*sums, torch.zeros_like(sums[0])], dim=1)
        return (-above_threshold.diff(dim=1).unsqueeze(2) * self.signs).sum(1)

    def move_inside(self, latent: Tensor, weights: Tensor) -> Tensor:
        """Move latent weights [N, K] into the cells of the given levels `weights` [N, K]; return the result.

        What is inside of its cell already stays, but for MARGIN at its ends (a quarter of a narrower cell).
        """
        wanted = weights.abs() / self.unit
        lower, upper = torch.zeros_like(wanted), torch.full_like(wanted, float(self.bound))
        for index in range(self.thresholds.shape[1]):
            threshold = self.thresholds[:, index : index + 1]
            lower = torch.where(wanted > threshold, threshold, lower)
            upper = torch.where(wanted > threshold, upper, torch.minimum(upper, threshold))
        margin = ((upper - lower) / 4).clamp_max_(MARGIN)
        direction = _direction(weights)
        return torch.clamp(latent * direction, lower + margin, upper - margin) * direction

    def _above(self, latent: Tensor) -> Iterator[Tensor]:
        """Yield, for each threshold, whether each magnitude is above it, as float32; a buffer that is reused."""
        magnitude, above = latent.abs(), torch.empty_like(latent)
        for index in range(self.thresholds.shape[1]):
            yield torch.gt(magnitude, self.thresholds[:, index : index + 1], out=above)


def level_unit(scale: Tensor) -> Tensor:
    """Return the unit of latent weights of rows with the scales [N, P]: [N, 1]."""
    unit: Tensor = scale.sum(1, keepdim=True) / (2 ** scale.shape[1] - 1)
    return unit


def sum_of_planes(signs: Tensor, scale: Tensor) -> Tensor:
    """Return sum_p alpha_p s_p for signs [N, P, K] and scales [N, P]: float32 [N, K]."""
    result = signs[:, 0] * scale[:, :1]
    for plane in range(1, scale.shape[1]):
        result.addcmul_(signs[:, plane].to(scale.dtype), scale[:, plane : plane + 1])
    return result


def _direction(latent: Tensor) -> Tensor:
    return torch.ones_like(latent).copysign_(latent)


class PlanesProduct(torch.autograd.Function):
    """Compute x W^T for W [N, K] with the scales [N, P] and int8 signs [N, P, K] or float latent weights [N, K].

    Products run in `dtype`, one for all planes. A latent weight gets the gradient of its level unless a step would push
    it further out of the range of the levels.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weights: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.flatten(0, -2).to(dtype)
        dense = _dense(weights, scale).to(dtype)
        # Fixed signs are summed again in the backward pass, because those of a whole model are held at a time.
        kept = dense if weights.is_floating_point() else dense.new_empty(0)
        ctx.save_for_backward(weights, scale, rows, kept)
        ctx.dtype, ctx.shape = dtype, x.shape[:-1]  # type: ignore[attr-defined]
        result: Tensor = (rows @ dense.mT).to(x.dtype).unflatten(0, x.shape[:-1])
        return result

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, None]:
        weights, scale, rows, dense = ctx.saved_tensors  # type: ignore[attr-defined]
        if not dense.numel():
            dense = _dense(weights, scale).to(ctx.dtype)  # type: ignore[attr-defined]
        output_gradient = gradient.flatten(0, -2).to(ctx.dtype)  # type: ignore[attr-defined]
        of_x = (output_gradient @ dense).to(gradient.dtype).unflatten(0, ctx.shape)  # type: ignore[attr-defined]
        of_weight = (output_gradient.mT @ rows).to(scale.dtype)
        if not weights.is_floating_point():
            of_scale = torch.stack([(plane * of_weight).sum(1) for plane in weights.unbind(1)], dim=1)
            return of_x, None, of_scale, None
        levels = Levels.of(scale)
        of_scale = levels.scale_gradient(weights, of_weight)
        kept = (weights.abs() <= levels.bound).logical_or_(of_weight * weights >= 0)
        return of_x, of_weight.mul_(levels.unit).mul_(kept.view(torch.int8)), of_scale, None


def _dense(weights: Tensor, scale: Tensor) -> Tensor:
    if weights.is_floating_point():
        return Levels.of(scale).weights(weights)
    return sum_of_planes(weights, scale)


def planes_product(x: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """Multiply x [..., K] by weights of several planes, see `PlanesProduct`: [..., N].

    Without gradients the product runs in x's dtype.
    """
    dtype = product_dtype(x.device) if torch.is_grad_enabled() else x.dtype
    function: Any = PlanesProduct.apply  # untyped in torch
    result: Tensor = function(x, weights, scale, dtype)
    return result


def in_descending_order(signs: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return signs [N, P, K] and scales [N, P] with the planes of each row in descending order of their scales."""
    order = scale.argsort(dim=1, descending=True, stable=True)
    return signs.gather(1, order.unsqueeze(2).expand_as(signs)), scale.gather(1, order)

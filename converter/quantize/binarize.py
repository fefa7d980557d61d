"""Signs and scales of a rotated weight in closed form: W is approximated by diag(alpha) S diag(beta).

For positive alpha and beta the best signs are those of W. The best scales are then the best rank-one approximation of
|W|, found by alternating least squares (the row and column scales of BWLA, arXiv 2605.00422, and of ARB-LLM,
arXiv 2410.03129).

The least-squares estimate is biased towards zero: it retains 2/pi of a Gaussian row in every direction, and the rest is
noise. The low-rank correction retains all of its directions, so together they distort the layer's function, which costs
more than the correction gains. `unbiased` rescales the rows to remove the bias at the cost of a larger weight error
(the scale of DRIVE, arXiv 2105.08339).
"""

import math
from dataclasses import dataclass, replace

import torch
from bwla_converter.common.tensors import split_rows, sum_in_double
from torch import Tensor

COLUMN_SCALE_RANGE = (1 / 8, 8.0)
"""Bounds of the column scales before normalization. Column scales multiply the activations, and a few large columns
would take the resolution of the activation codes from all others."""

SMALLEST_ROW_SCALE = 1e-30
"""Used instead of 0 for rows of zeros, because the format requires positive scales."""

LARGEST_CORRECTION = 2.0
"""Upper bound of the unbiased scale relative to the least-squares scale. At 2, the noise is as large as the row."""


@dataclass(frozen=True)
class Scales:
    """Row and column scales of a sign matrix.

    Attributes:
        row: alpha, float32 [N], positive.
        column: beta, float32 [K], positive, geometric mean 1; 1 for columns of zeros.
        trace: ||W - diag(alpha) S diag(beta)||_F / ||W||_F with row scales alone, then after each round;
            non-increasing.
    """

    row: Tensor
    column: Tensor
    trace: list[float]


def signs(weight: Tensor) -> Tensor:
    """Return the signs in {-1, +1}, int8 in the shape of `weight`; the sign of 0 is +1."""
    return (weight >= 0).to(torch.int8) * 2 - 1


def fit_scales(weight: Tensor, *, rounds: int = 12) -> Scales:
    """Fit row and column scales to |weight| by alternating least squares.

    Args:
        weight: float32 [N, K], finite; the rows of all linears of an input group, which share the column scales.
        rounds: number of alternations. The first ones matter most; 0 keeps the column scales at 1.
    """
    squared_norm = sum(float(part.double().square().sum()) for part in split_rows(weight))
    column = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
    row, dots = _fit_rows(weight, column)
    trace = [_relative_error(row, dots, column, squared_norm)]
    empty = sum_in_double((part != 0).any(0) for part in split_rows(weight)) == 0
    for _ in range(rounds):
        column = _fit_columns(weight, row).clamp(*COLUMN_SCALE_RANGE).masked_fill(empty, 1.0)
        row, dots = _fit_rows(weight, column)
        trace.append(_relative_error(row, dots, column, squared_norm))
    mean = float(column[~empty].log().mean().exp()) if not bool(empty.all()) else 1.0
    return Scales(
        (row * mean).float().clamp_min(SMALLEST_ROW_SCALE),
        (column / mean).masked_fill(empty, 1.0).float(),
        trace,
    )


def unbiased(weight: Tensor, scales: Scales) -> Scales:
    """Rescale each row so that W' = diag(alpha) S diag(beta) is unbiased: <W'_i, W_i> = ||W_i||^2.

    alpha_i = sum_j w_ij^2 / sum_j |w_ij| beta_j, at most LARGEST_CORRECTION times the least-squares scale. Column
    scales and the trace are unchanged.

    Args:
        weight: the weight that `scales` were fitted to.
        scales: from `fit_scales`.
    """
    dots = torch.cat([(part.abs() @ scales.column).double() for part in split_rows(weight)])
    squared_norms = torch.cat([part.double().square().sum(1) for part in split_rows(weight)])
    row = torch.where(dots > 0, squared_norms / dots, 0.0).clamp_min(SMALLEST_ROW_SCALE)
    return replace(scales, row=torch.minimum(row.float(), LARGEST_CORRECTION * scales.row))


def _fit_rows(weight: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha = |W| beta / (beta . beta) and |W| beta, float64 [N]."""
    beta = column.to(weight)
    dots = torch.cat([(part.abs() @ beta).double() for part in split_rows(weight)])
    return dots / column.square().sum(), dots


def _fit_columns(weight: Tensor, row: Tensor) -> Tensor:
    """Return beta = |W|^T alpha / (alpha . alpha), float64 [K]; 1 if all rows are zero."""
    parts = split_rows(weight)
    alphas = row.to(weight).split([len(part) for part in parts])
    dots = sum_in_double(part.abs().mT @ alpha for part, alpha in zip(parts, alphas, strict=True))
    squared_norm = row.square().sum()
    return torch.where(squared_norm > 0, dots / squared_norm, torch.ones_like(dots))


def _relative_error(row: Tensor, dots: Tensor, column: Tensor, squared_norm: float) -> float:
    """Compute the relative error from ||W||^2 - 2 alpha . (|W| beta) + |alpha|^2 |beta|^2; 0 for a weight of zeros."""
    if squared_norm == 0:
        return 0.0
    squared_error = squared_norm - 2.0 * float(row @ dots) + float(row.square().sum() * column.square().sum())
    return math.sqrt(max(squared_error, 0.0) / squared_norm)

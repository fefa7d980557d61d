"""Signs and scales of a rotated weight in closed form: W is replaced by diag(alpha) S diag(beta).

For positive alpha and beta the best signs are those of W, whatever the scales; what is left is the best
rank-one approximation of |W|, found by alternating least squares (the row and column scales of BWLA,
arXiv 2605.00422, and of ARB-LLM, arXiv 2410.03129).

Least squares shrinks: of a Gaussian row it keeps a share of 2/pi of every direction, the rest being noise.
Beside a low-rank part, which keeps all of its directions, that changes what the layer does, and it costs more
than the low-rank part brings. `unbiased` rescales the rows so that nothing shrinks, at a larger distance (the
scale of DRIVE, arXiv 2105.08339).
"""

import math
from dataclasses import dataclass, replace

import torch
from bwla_converter.common.tensors import split_rows, sum_in_double
from torch import Tensor

COLUMN_SCALE_RANGE = (1 / 8, 8.0)
"""Column scales are held within this range before they are normalised: they multiply the activations, and
one token's codes must not be spent on a few columns."""

SMALLEST_ROW_SCALE = 1e-30
"""Stands for 0 in rows of zeros: the format wants positive scales."""

LARGEST_CORRECTION = 2.0
"""At twice the scale of least squares the noise has grown to the row itself, whatever the row."""


@dataclass(frozen=True)
class Scales:
    """Row and column scales of a sign matrix.

    Attributes:
        row: alpha, float32 [N], positive.
        column: beta, float32 [K], positive, geometric mean 1; 1 for columns of zeros.
        trace: ||W - diag(alpha) S diag(beta)||_F / ||W||_F with row scales alone, then after each round;
            never grows.
    """

    row: Tensor
    column: Tensor
    trace: list[float]


def signs(weight: Tensor) -> Tensor:
    """Signs in {-1, +1}, int8 of the shape of `weight`; 0 counts as +1."""
    return (weight >= 0).to(torch.int8) * 2 - 1


def fit_scales(weight: Tensor, *, rounds: int = 12) -> Scales:
    """Least-squares row and column scales of |weight|, by `rounds` alternations.

    Args:
        weight: float32 [N, K], finite; the pooled rows of an input group, which shares the column scales.
        rounds: alternations; the first ones do nearly all, and 0 keeps the column scales at 1.
    """
    power = sum(float(part.double().square().sum()) for part in split_rows(weight))
    column = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
    row, dots = _fit_rows(weight, column)
    trace = [_relative_error(row, dots, column, power)]
    empty = sum_in_double((part != 0).any(0) for part in split_rows(weight)) == 0
    for _ in range(rounds):
        column = _fit_columns(weight, row).clamp(*COLUMN_SCALE_RANGE).masked_fill(empty, 1.0)
        row, dots = _fit_rows(weight, column)
        trace.append(_relative_error(row, dots, column, power))
    mean = float(column[~empty].log().mean().exp()) if not bool(empty.all()) else 1.0
    return Scales(
        (row * mean).float().clamp_min(SMALLEST_ROW_SCALE),
        (column / mean).masked_fill(empty, 1.0).float(),
        trace,
    )


def unbiased(weight: Tensor, scales: Scales) -> Scales:
    """Rescale each row so that W' = diag(alpha) S diag(beta) keeps all of W: <W'_i, W_i> = ||W_i||^2.

    alpha_i = sum_j w_ij^2 / sum_j |w_ij| beta_j, at most LARGEST_CORRECTION times what least squares gave.
    Signs, column scales and the trace of least squares stay.

    Args:
        weight: what `scales` were fitted to.
    """
    dots = torch.cat([(part.abs() @ scales.column).double() for part in split_rows(weight)])
    power = torch.cat([part.double().square().sum(1) for part in split_rows(weight)])
    row = torch.where(dots > 0, power / dots, 0.0).clamp_min(SMALLEST_ROW_SCALE)
    return replace(scales, row=torch.minimum(row.float(), LARGEST_CORRECTION * scales.row))


def _fit_rows(weight: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """alpha = |W| beta / (beta . beta), and |W| beta, float64 [N]."""
    here = column.to(weight)
    dots = torch.cat([(part.abs() @ here).double() for part in split_rows(weight)])
    return dots / column.square().sum(), dots


def _fit_columns(weight: Tensor, row: Tensor) -> Tensor:
    """beta = |W|^T alpha / (alpha . alpha), float64 [K]; 1 where all rows are zero."""
    parts = split_rows(weight)
    rows = row.to(weight).split([len(part) for part in parts])
    dots = sum_in_double(part.abs().mT @ here for part, here in zip(parts, rows, strict=True))
    power = row.square().sum()
    return torch.where(power > 0, dots / power, torch.ones_like(dots))


def _relative_error(row: Tensor, dots: Tensor, column: Tensor, power: float) -> float:
    """From ||W||^2 - 2 alpha . (|W| beta) + |alpha|^2 |beta|^2; 0 for a weight of zeros."""
    if power == 0:
        return 0.0
    rest = power - 2.0 * float(row @ dots) + float(row.square().sum() * column.square().sum())
    return math.sqrt(max(rest, 0.0) / power)

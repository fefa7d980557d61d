"""Distributions of the rows of weights and activations, before and after rotation and column scale.

A row of a weight shares one row scale; a row of activations is one token. Rows are described in units of their own
root mean square, by these figures:

- kurtosis m4 / m2^2 of the values around their mean: 3 for a Gaussian, 1 for two equal peaks, large for outliers;
- Sarle's bimodality coefficient (skewness^2 + 1) / kurtosis with its sample correction, as SAS defines it: 1/3 for
  a Gaussian, 5/9 for a uniform distribution, 1 for two values;
- binarization error 1 - mean(|w|)^2 / mean(w^2): the share of the power that signs with the best scale lose;
- peak max|x| / rms: the range that a quantizer has to cover.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from bwla_converter.common.tensors import sample_rows, split_rows
from bwla_kernels.reference import rotate
from torch import Tensor

MAX_ELEMENTS = 2**18
"""Maximum number of elements of a matrix that are described, in evenly spaced rows; takes about ten milliseconds."""

BINS = 64
WEIGHT_SPAN = 4.0
ACTIVATION_SPAN = 8.0
"""Histograms cover plus and minus this many root mean squares."""


@dataclass(frozen=True)
class Distribution:
    """Distribution of rows in units of their own root mean square; constant rows count in the histogram only.

    Attributes:
        kurtosis, bimodality, binarization_error, peak: means over the rows; 0 if all rows are constant.
        peak_p99: 99th percentile of the rows' peaks.
        span: the histogram covers [-span, span].
        histogram: share of all values in each of `BINS` equal bins.
        outside: share of the values outside the histogram.
    """

    kurtosis: float
    bimodality: float
    binarization_error: float
    peak: float
    peak_p99: float
    span: float
    histogram: list[float]
    outside: float


@dataclass(frozen=True)
class Change:
    """Distributions of the same rows before and after rotation and column scale."""

    before: Distribution
    after: Distribution


def row_figures(rows: Tensor) -> Tensor:
    """Return kurtosis, bimodality coefficient, binarization error and peak of each row that is not constant.

    Args:
        rows: float32 [N, K], K at least 4.

    Returns: float64 [number of such rows, 4].
    """
    values = rows[(rows != rows[:, :1]).any(1)].double()
    n = values.shape[1]
    centred = values - values.mean(1, keepdim=True)
    squares = centred.square()
    m2, m3, m4 = squares.mean(1), centred.mul_(squares).mean(1), squares.square_().mean(1)
    kurtosis = m4 / m2.square()
    skewness = m3 / m2.pow(1.5) * (n * (n - 1)) ** 0.5 / (n - 2)
    excess = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (kurtosis - 3) + 6)
    bimodality = (skewness.square() + 1) / (excess + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))
    power = values.square().mean(1)
    error = 1 - values.abs().mean(1).square() / power
    return torch.stack([kurtosis, bimodality, error, values.abs().amax(1) / power.sqrt()], 1)


def describe(rows: Iterable[Tensor], span: float) -> Distribution:
    """Describe the rows of all matrices [N_i, K] in `rows`, of any float dtype."""
    parts, counts, total = [], torch.zeros(BINS, dtype=torch.float64), 0
    for part in rows:
        values = part.float()
        parts.append(row_figures(values).cpu())
        unit = values / values.square().mean(1, keepdim=True).sqrt().clamp_min(
            torch.finfo(torch.float32).tiny
        )
        counts += torch.histc(unit, BINS, -span, span).double().cpu()
        total += unit.numel()
    figures = torch.cat(parts)
    kurtosis, bimodality, error, peak = figures.mean(0).tolist() if len(figures) else [0.0] * 4
    p99 = float(figures[:, 3].quantile(0.99)) if len(figures) else 0.0
    shares = (counts / max(total, 1)).tolist()
    return Distribution(
        kurtosis=round(kurtosis, 5),
        bimodality=round(bimodality, 5),
        binarization_error=round(error, 5),
        peak=round(peak, 5),
        peak_p99=round(p99, 5),
        span=span,
        histogram=[round(share, 7) for share in shares],
        outside=round(max(0.0, 1 - sum(shares)), 7),
    )


def weight_statistics(weight: Tensor, left: Tensor, right: Tensor, column_scale: Tensor) -> Change:
    """Describe a weight [N, K], and what is binarized: the weight rotated and divided by the column scale.

    Args:
        weight: any float dtype.
        left, right: the rotation's factors, see `bwla_kernels.reference.rotate`.
        column_scale: [K].
    """
    rows = sample_rows(weight, MAX_ELEMENTS)
    left, right, column_scale = (each.to(rows.device) for each in (left, right, column_scale))
    binarized = (rotate(part.float(), left, right) / column_scale for part in split_rows(rows))
    return Change(describe(split_rows(rows), WEIGHT_SPAN), describe(binarized, WEIGHT_SPAN))


def activation_statistics(x: Tensor, left: Tensor, right: Tensor, column_scale: Tensor) -> Change:
    """Describe the inputs [..., K] of an input group, and what is quantized: rotated and times the column scale.

    Args:
        x: any float dtype; evenly spaced tokens are sampled.
        left, right, column_scale: as in `weight_statistics`.
    """
    rows = sample_rows(x.reshape(-1, x.shape[-1]), MAX_ELEMENTS)
    left, right, column_scale = (each.to(rows.device) for each in (left, right, column_scale))
    quantized = (rotate(part.float(), left, right) * column_scale for part in split_rows(rows))
    return Change(describe(split_rows(rows), ACTIVATION_SPAN), describe(quantized, ACTIVATION_SPAN))

"""How rows of weights and of activations are distributed, before and after a layer's rotation and column scale.

A row of a weight is what one row scale and its signs stand for; a row of activations is one token. Both are
described in units of their own root mean square, by the same figures:

- kurtosis m4 / m2^2 of the values around their mean: 3 for a Gaussian, 1 for two equal peaks, large for outliers;
- Sarle's bimodality coefficient (skewness^2 + 1) / kurtosis with its sample correction, as SAS defines it: 1/3 for
  a Gaussian, 5/9 for a uniform distribution, 1 for two values;
- binarization error 1 - mean(|w|)^2 / mean(w^2): the share of the power that signs and the best scale lose;
- peak max|x| / rms: what a quantizer's largest code must reach.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from bwla_converter.common.tensors import sample_rows, split_rows
from bwla_kernels.reference import rotate
from torch import Tensor

BINS = 64
WEIGHT_SPAN = 4.0
ACTIVATION_SPAN = 8.0
"""Histograms reach from minus to plus this many root mean squares."""


@dataclass(frozen=True)
class Distribution:
    """Rows in units of their own root mean square; rows without variance count in the histogram only.

    Attributes:
        kurtosis, bimodality, binarization_error, peak: means over the rows; 0 where no row varies.
        peak_p99: the peak that one row in a hundred exceeds.
        span: the histogram's reach.
        histogram: share of all values in each of `BINS` equal bins over [-span, span].
        outside: share of the values beyond it.
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
    """The same rows before and after."""

    before: Distribution
    after: Distribution


def row_figures(rows: Tensor) -> Tensor:
    """Kurtosis, bimodality coefficient, binarization error and peak of each row that varies.

    Args:
        rows: float32 [N, K], K at least 4.

    Returns: float64 [rows that vary, 4].
    """
    values = rows.double()
    rows_vary = values.std(1) > 0
    values = values[rows_vary]
    n = values.shape[1]
    centred = values - values.mean(1, keepdim=True)
    m2, m3, m4 = (centred.pow(power).mean(1) for power in (2, 3, 4))
    kurtosis = m4 / m2.square()
    skewness = m3 / m2.pow(1.5) * (n * (n - 1)) ** 0.5 / (n - 2)
    excess = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (kurtosis - 3) + 6)
    bimodality = (skewness.square() + 1) / (excess + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))
    power = values.square().mean(1)
    error = 1 - values.abs().mean(1).square() / power
    return torch.stack([kurtosis, bimodality, error, values.abs().amax(1) / power.sqrt()], 1)


def describe(rows: Iterable[Tensor], span: float) -> Distribution:
    """Figures and histogram of the rows of all `rows`, each [N_i, K] of any float dtype."""
    figures, counts, total = [], torch.zeros(BINS, dtype=torch.float64), 0
    for part in rows:
        values = part.float()
        figures.append(row_figures(values).cpu())
        unit = values / values.square().mean(1, keepdim=True).sqrt().clamp_min(
            torch.finfo(torch.float32).tiny
        )
        counts += torch.histc(unit, BINS, -span, span).double().cpu()
        total += unit.numel()
    found = torch.cat(figures)
    kurtosis, bimodality, error, peak = found.mean(0).tolist() if len(found) else [0.0] * 4
    p99 = float(found[:, 3].quantile(0.99)) if len(found) else 0.0
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
    """A weight [N, K] as it was, and as its signs see it: rotated and divided by the column scale.

    Args:
        weight: any float dtype.
        left, right: the layer's rotation, see `bwla_kernels.reference.rotate`.
        column_scale: [K].
    """
    rows = sample_rows(weight)
    left, right, column_scale = (each.to(rows.device) for each in (left, right, column_scale))
    seen = (rotate(part.float(), left, right) / column_scale for part in split_rows(rows))
    return Change(describe(split_rows(rows), WEIGHT_SPAN), describe(seen, WEIGHT_SPAN))


def activation_statistics(x: Tensor, left: Tensor, right: Tensor, column_scale: Tensor) -> Change:
    """A group's inputs [..., K] as they come, and as they are quantized: rotated, times the column scale.

    Args:
        x: any float dtype; evenly spaced tokens are looked at.
        left, right, column_scale: as in `weight_statistics`.
    """
    rows = sample_rows(x.reshape(-1, x.shape[-1]))
    left, right, column_scale = (each.to(rows.device) for each in (left, right, column_scale))
    seen = (rotate(part.float(), left, right) * column_scale for part in split_rows(rows))
    return Change(describe(split_rows(rows), ACTIVATION_SPAN), describe(seen, ACTIVATION_SPAN))

"""One-bit GPTQ: signs and row scales with a small output error.

GPTQ's error feedback (arXiv 2210.17323) with one-bit codes chooses the signs column by column. Coordinate descent then
flips single signs as long as the error falls. Both minimize, for each row w with scale a and signs s,
f(s) = (w - a s) H (w - a s)^T. Both cost O(N K^2) operations in K sequential steps.

`binarize_reference` defines the result. `gptq_binarize` uses the compiled kernel where there is one; its sums run in
another order, so it may choose the other sign where both are almost equally good.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from bwla_kernels.cpu.gptq_binary import can_binarize
from torch import Tensor

log = logging.getLogger(__name__)

COLUMN_CHUNK = 128
"""Columns processed before their updates are applied to the remaining ones in one matrix product."""

INITIAL_SCALE_FACTORS = (0.75, 1.0, 1.3, 1.7)
"""Initial row scales to try, in units of the row's mean magnitude."""


def row_chunk_elements(device: str) -> int:
    """Return how many weights to binarize at a time on a device type; that takes fifteen times their memory.

    A GPU needs many rows to be busy; a CPU needs few.
    """
    return 2**24 if device == "cpu" else 2**27


@dataclass(frozen=True)
class BinaryWeight:
    """Signs with one scale per row.

    Attributes:
        sign: float32 [N, K], -1 or +1.
        scale: float32 [N], positive.
        error: f of each row, float32 [N].
    """

    sign: Tensor
    scale: Tensor
    error: Tensor

    def dequantize(self) -> Tensor:
        """Return diag(scale) sign, float32 [N, K]."""
        return self.scale.unsqueeze(1) * self.sign


@dataclass(frozen=True)
class Candidate(BinaryWeight):
    """A binary weight during the search.

    Attributes:
        sign_hessian: S H, float32 [N, K].
    """

    sign_hessian: Tensor


def inverse_cholesky(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of H, float32 [K, K], from which GPTQ propagates errors."""
    lower = torch.linalg.cholesky(hessian.double())
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper.float()


def gptq_signs(weight: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """Return signs for `weight` [N, K] at fixed row scales, with each column's error fed back to the columns after it.

    Args:
        weight: float32 [N, K].
        scale: float32 [N].
        factor: `inverse_cholesky` of H.
    """
    compensated, sign = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMN_CHUNK):
        columns = slice(start, start + COLUMN_CHUNK)
        chunk_factor, chunk = factor[columns, columns], compensated[:, columns]
        errors = torch.empty_like(chunk)
        for j in range(chunk.shape[1]):
            sign[:, start + j] = torch.where(chunk[:, j] >= 0, 1.0, -1.0)
            errors[:, j] = (chunk[:, j] - scale * sign[:, start + j]) / chunk_factor[j, j]
            chunk[:, j + 1 :].addr_(errors[:, j], chunk_factor[j, j + 1 :], alpha=-1.0)
        compensated[:, columns.stop :].addmm_(errors, factor[columns, columns.stop :], alpha=-1.0)
    return sign


def fit_row_scales(weight_hessian: Tensor, weight_norm: Tensor, sign: Tensor, hessian: Tensor) -> Candidate:
    """Fit the scale of each row to its signs by least squares: a = (w H s) / (s H s), kept positive.

    Args:
        weight_hessian: W H, float32 [N, K].
        weight_norm: w H w^T of each row, float32 [N].
        sign: float32 [N, K].
        hessian: H, float32 [K, K].
    """
    sign_hessian = sign @ hessian
    dots, norms = (weight_hessian * sign).sum(1), (sign_hessian * sign).sum(1)
    scale = (dots / norms).clamp_min(torch.finfo(torch.float32).tiny)
    return Candidate(sign, scale, weight_norm - 2.0 * scale * dots + scale.square() * norms, sign_hessian)


def coordinate_descent_sweep(candidate: Candidate, weight_hessian: Tensor, hessian: Tensor) -> Tensor:
    """Visit every sign once and flip it if that lowers f. Return the new signs.

    With g = (a s - w) H, flipping s_j changes f by 4 a (a H_jj - s_j g_j).
    """
    sign, scale = candidate.sign.clone(), candidate.scale.unsqueeze(1)
    gradient = scale * candidate.sign_hessian - weight_hessian
    for start in range(0, sign.shape[1], COLUMN_CHUNK):
        columns = slice(start, start + COLUMN_CHUNK)
        chunk_hessian, chunk_gradient, chunk = (
            hessian[columns, columns],
            gradient[:, columns],
            sign[:, columns],
        )
        before = chunk.clone()
        for j in range(chunk.shape[1]):
            gain = chunk[:, j] * chunk_gradient[:, j] - candidate.scale * chunk_hessian[j, j]
            change = torch.where(gain > 0, -2.0 * chunk[:, j], 0.0)
            chunk[:, j] += change
            chunk_gradient[:, j:].addr_(candidate.scale * change, chunk_hessian[j, j:])
        gradient[:, columns.stop :].addmm_(scale * (chunk - before), hessian[columns, columns.stop :])
    return sign


def gptq_binarize(
    weight: Tensor,
    hessian: Tensor,
    factor: Tensor,
    sweeps: int,
    error_feedback: bool = True,
    refine_all: bool = False,
) -> BinaryWeight:
    """Binarize `weight` with a small output error.

    Args:
        weight: float32 [N, K].
        hessian: H, positive definite, float32 [K, K].
        factor: `inverse_cholesky` of H.
        sweeps: sweeps of coordinate descent; each is followed by a least-squares fit of the scales.
        error_feedback: choose the initial signs with GPTQ's error feedback; otherwise they are the weight's own.
        refine_all: run coordinate descent from every initial scale and keep the best result of each row; otherwise
            only from the initial scale with the smallest error. That one often does not lead to the smallest final
            error, but trying all multiplies the cost of the sweeps.
    """
    chunk_rows = max(1, row_chunk_elements(weight.device.type) // weight.shape[1])
    compiled, reason = can_binarize(weight)
    if weight.is_cpu and not compiled:
        _warn_slow(reason)
    if compiled:
        weight, hessian, factor = weight.contiguous(), hessian.contiguous(), factor.contiguous()
    binarize = _binarize_compiled if compiled else binarize_reference
    chunks = [
        binarize(chunk, hessian, factor, sweeps, error_feedback, refine_all)
        for chunk in weight.split(chunk_rows)
    ]
    return BinaryWeight(
        torch.cat([chunk.sign for chunk in chunks]),
        torch.cat([chunk.scale for chunk in chunks]),
        torch.cat([chunk.error for chunk in chunks]),
    )


@functools.cache
def _warn_slow(reason: str) -> None:
    log.warning(
        "signs are searched by the reference implementation, which is several times slower: %s", reason
    )


def _binarize_compiled(
    weight: Tensor, hessian: Tensor, factor: Tensor, sweeps: int, error_feedback: bool, refine_all: bool
) -> BinaryWeight:
    """Binarize rows with the compiled kernel; arguments as in `gptq_binarize`, all contiguous."""
    sign, scale, error = torch.ops.bwla.gptq_binarize_cpu(
        weight,
        weight @ hessian,
        hessian,
        factor if error_feedback else None,
        INITIAL_SCALE_FACTORS,
        sweeps,
        refine_all,
    )
    return BinaryWeight(sign, scale, error)


def binarize_reference(
    weight: Tensor, hessian: Tensor, factor: Tensor, sweeps: int, error_feedback: bool, refine_all: bool
) -> BinaryWeight:
    """Binarize rows; arguments as in `gptq_binarize`."""
    weight_hessian = weight @ hessian
    weight_norm = (weight_hessian * weight).sum(1)

    def fit(sign: Tensor) -> Candidate:
        return fit_row_scales(weight_hessian, weight_norm, sign, hessian)

    def refine(candidate: Candidate) -> Candidate:
        for _ in range(sweeps):
            candidate = _better(candidate, fit(coordinate_descent_sweep(candidate, weight_hessian, hessian)))
        return candidate

    if not error_feedback:
        return refine(fit(torch.where(weight >= 0, 1.0, -1.0)))
    candidates = map(fit, _initial_signs(weight, factor))
    best = reduce(_better, map(refine, candidates)) if refine_all else refine(reduce(_better, candidates))
    return BinaryWeight(best.sign, best.scale, best.error)


def _initial_signs(weight: Tensor, factor: Tensor) -> Iterator[Tensor]:
    """Yield the signs that error feedback chooses with each of the initial scales."""
    mean_magnitude = weight.abs().mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    for scale_factor in INITIAL_SCALE_FACTORS:
        yield gptq_signs(weight, scale_factor * mean_magnitude, factor)


def _better(first: Candidate, second: Candidate) -> Candidate:
    """Select, row by row, the candidate with the smaller error."""
    take_second = second.error < first.error
    rows = take_second.unsqueeze(1)
    return Candidate(
        torch.where(rows, second.sign, first.sign),
        torch.where(take_second, second.scale, first.scale),
        torch.where(take_second, second.error, first.error),
        torch.where(rows, second.sign_hessian, first.sign_hessian),
    )

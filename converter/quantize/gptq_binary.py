"""Signs chosen for the output's error: what one column loses, later columns make good.

Error feedback is GPTQ's (arXiv 2210.17323) with a one-bit code; coordinate descent then flips single signs while
the error falls. Both minimise, row by row, f(s) = (w - a s) H (w - a s)^T for a row w, its scale a, signs s.
All cost O(N K^2) and K sequential steps.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

COLUMNS_AT_ONCE = 128
"""Columns handled before what they changed is carried to the rest by one matrix product."""

START_FACTORS = (0.75, 1.0, 1.3, 1.7)
"""Starting scales that each row tries, in units of its mean magnitude."""


def elements_at_once(device: str) -> int:
    """Weights whose signs are chosen together on a kind of device; that takes fifteen times their memory.

    Many rows at a time keep a GPU busy; a CPU is busy with few.
    """
    return 2**24 if device == "cpu" else 2**27


@dataclass(frozen=True)
class Code:
    """Rows of signs with a scale each.

    Attributes:
        sign: float32 [N, K], -1 or +1.
        scale: float32 [N], positive.
        error: f of each row, float32 [N].
    """

    sign: Tensor
    scale: Tensor
    error: Tensor


@dataclass(frozen=True)
class Trial(Code):
    """A code on the way.

    Attributes:
        sign_hessian: S H, float32 [N, K].
    """

    sign_hessian: Tensor


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of H, float32 [K, K]: its rows say how errors are carried on."""
    lower = torch.linalg.cholesky(hessian.double())
    inverse: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return inverse.float()


def gptq_signs(weight: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """Signs of `weight` [N, K] at fixed row scales, each column's error carried on to those after it.

    Args:
        weight: float32 [N, K].
        scale: float32 [N].
        factor: from `inverse_factor`.
    """
    work, sign = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS_AT_ONCE):
        columns = slice(start, start + COLUMNS_AT_ONCE)
        local, own = factor[columns, columns], work[:, columns]
        errors = torch.empty_like(own)
        for j in range(own.shape[1]):
            sign[:, start + j] = torch.where(own[:, j] >= 0, 1.0, -1.0)
            errors[:, j] = (own[:, j] - scale * sign[:, start + j]) / local[j, j]
            own[:, j + 1 :].addr_(errors[:, j], local[j, j + 1 :], alpha=-1.0)
        work[:, columns.stop :].addmm_(errors, factor[columns, columns.stop :], alpha=-1.0)
    return sign


def refit(weight_metric: Tensor, power: Tensor, sign: Tensor, hessian: Tensor) -> Trial:
    """The best scale of each row for its signs: a = (w H s) / (s H s), kept positive.

    Args:
        weight_metric: W H [N, K].
        power: w H w of each row [N].
        sign: [N, K].
        hessian: H.
    """
    sign_hessian = sign @ hessian
    dots, norms = (weight_metric * sign).sum(1), (sign_hessian * sign).sum(1)
    scale = (dots / norms).clamp_min(torch.finfo(torch.float32).tiny)
    return Trial(sign, scale, power - 2.0 * scale * dots + scale.square() * norms, sign_hessian)


def coordinate_descent_sweep(code: Trial, weight_metric: Tensor, hessian: Tensor) -> Tensor:
    """One sweep of coordinate descent: every sign in turn is flipped where that lowers f. Returns the signs.

    With g = (a s - w) H, flipping s_j changes f by 4 a (a H_jj - s_j g_j).
    """
    sign, scale = code.sign.clone(), code.scale.unsqueeze(1)
    gradient = scale * code.sign_hessian - weight_metric
    for start in range(0, sign.shape[1], COLUMNS_AT_ONCE):
        columns = slice(start, start + COLUMNS_AT_ONCE)
        local, own, here = hessian[columns, columns], gradient[:, columns], sign[:, columns]
        before = here.clone()
        for j in range(here.shape[1]):
            gain = here[:, j] * own[:, j] - code.scale * local[j, j]
            change = torch.where(gain > 0, -2.0 * here[:, j], 0.0)
            here[:, j] += change
            own[:, j:].addr_(code.scale * change, local[j, j:])
        gradient[:, columns.stop :].addmm_(scale * (here - before), hessian[columns, columns.stop :])
    return sign


def one_bit(
    weight: Tensor,
    hessian: Tensor,
    factor: Tensor,
    sweeps: int,
    feedback: bool = True,
    every_start: bool = False,
) -> Code:
    """Signs and scales of `weight` [N, K] in the metric `hessian`.

    Args:
        weight: float32 [N, K].
        hessian: H, positive definite [K, K].
        factor: its `inverse_factor`.
        sweeps: sweeps of coordinate descent, each followed by a refit of the scales.
        feedback: without it, the signs are the weight's own.
        every_start: descend from every starting scale and keep what ends best, row by row; otherwise only from what
            starts best. What starts best often does not end best, but this costs as many times the sweeps.
    """
    rows = max(1, elements_at_once(weight.device.type) // weight.shape[1])
    parts = [_code_rows(part, hessian, factor, sweeps, feedback, every_start) for part in weight.split(rows)]
    return Code(
        torch.cat([part.sign for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.error for part in parts]),
    )


def _code_rows(
    weight: Tensor, hessian: Tensor, factor: Tensor, sweeps: int, feedback: bool, every_start: bool
) -> Code:
    """As `one_bit`, all rows at once."""
    metric = weight @ hessian
    power = (metric * weight).sum(1)
    mean = weight.abs().mean(1).clamp_min(torch.finfo(torch.float32).tiny)

    def descended(code: Trial) -> Trial:
        for _ in range(sweeps):
            code = _better(
                code, refit(metric, power, coordinate_descent_sweep(code, metric, hessian), hessian)
            )
        return code

    if not feedback:
        return descended(refit(metric, power, torch.where(weight >= 0, 1.0, -1.0), hessian))
    signs = (gptq_signs(weight, start * mean, factor) for start in START_FACTORS)
    codes = (refit(metric, power, sign, hessian) for sign in signs)
    best = reduce(_better, map(descended, codes)) if every_start else descended(reduce(_better, codes))
    return Code(best.sign, best.scale, best.error)


def _better(one: Trial, other: Trial) -> Trial:
    """Row by row the one with the smaller error."""
    take = other.error < one.error
    rows = take.unsqueeze(1)
    return Trial(
        torch.where(rows, other.sign, one.sign),
        torch.where(take, other.scale, one.scale),
        torch.where(take, other.error, one.error),
        torch.where(rows, other.sign_hessian, one.sign_hessian),
    )

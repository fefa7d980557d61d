"""Signs in the metric of the inputs: what is promised of each step, and that each one lowers the error."""

import itertools
from dataclasses import replace

import pytest
import torch
from bwla_kernels import gptq_binary
from bwla_kernels.gptq_binary import (
    coordinate_descent_sweep,
    fit_row_scales,
    gptq_binarize,
    gptq_signs,
    inverse_cholesky,
)
from torch import Tensor


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian rows and a metric with strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    hessian = mix @ mix.mT / columns + 0.02 * torch.eye(columns)
    return torch.randn(rows, columns, generator=generator), hessian


def error(weight: Tensor, scale: Tensor, sign: Tensor, hessian: Tensor) -> Tensor:
    rest = (weight - scale.unsqueeze(1) * sign).double()
    return ((rest @ hessian.double()) * rest).sum(1)


def test_factor_is_that_of_the_inverse() -> None:
    _, hessian = problem(1, 40)
    factor = inverse_cholesky(hessian)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.mT @ factor, torch.linalg.inv(hessian), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [16, 200, 256])
def test_feedback_is_the_column_by_column_rule(columns: int) -> None:
    """GPTQ's rule in its plainest form: after column j the best rest given what was lost so far."""
    weight, hessian = problem(3, columns)
    weight, hessian, scale = weight.double(), hessian.double(), torch.full((3,), 0.7, dtype=torch.float64)
    work, inverse, expected = weight.clone(), torch.linalg.inv(hessian), torch.empty_like(weight)
    for j in range(columns):
        expected[:, j] = torch.where(work[:, j] >= 0, 1.0, -1.0)
        lost = (work[:, j] - scale * expected[:, j]) / inverse[0, 0]
        work[:, j:] -= lost.unsqueeze(1) * inverse[0]
        inverse = inverse[1:, 1:] - inverse[1:, :1] @ inverse[:1, 1:] / inverse[0, 0]
    found = gptq_signs(weight, scale, torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True))
    assert torch.equal(found, expected)


def test_refit_is_the_best_scale() -> None:
    weight, hessian = problem(5, 64)
    sign = torch.where(weight >= 0, 1.0, -1.0)
    metric = weight @ hessian
    code = fit_row_scales(metric, (metric * weight).sum(1), sign, hessian)
    here = error(weight, code.scale, sign, hessian)
    torch.testing.assert_close(code.error.double(), here, rtol=1e-3, atol=1e-4)
    for factor in (0.99, 1.01):
        assert bool((error(weight, code.scale * factor, sign, hessian) > here).all())


@pytest.mark.parametrize("columns", [30, 300])
def test_a_sweep_never_raises_the_error_and_ends_where_no_flip_helps(columns: int) -> None:
    weight, hessian = problem(6, columns)
    metric = weight @ hessian
    code = fit_row_scales(metric, (metric * weight).sum(1), torch.where(weight >= 0, 1.0, -1.0), hessian)
    before = error(weight, code.scale, code.sign, hessian)
    for _ in range(50):
        sign = coordinate_descent_sweep(code, metric, hessian)
        after = error(weight, code.scale, sign, hessian)
        assert bool((after <= before * (1 + 1e-5)).all())
        if torch.equal(sign, code.sign):
            break
        code, before = replace(code, sign=sign, sign_hessian=sign @ hessian), after
    else:
        raise AssertionError("coordinate descent did not end")
    for j in range(columns):
        other = code.sign.clone()
        other[:, j] *= -1
        assert bool((error(weight, code.scale, other, hessian) >= before * (1 - 1e-4)).all())


def test_close_to_the_best_of_all_signs() -> None:
    """Ten columns: all 1,024 patterns can be tried, each with its best scale."""
    weight, hessian = problem(40, 10, seed=3)
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)))
    dots = weight @ hessian @ patterns.mT
    norms = ((patterns @ hessian) * patterns).sum(1)
    power = ((weight @ hessian) * weight).sum(1)
    best = (power.unsqueeze(1) - dots.clamp_min(0).square() / norms).min(1).values
    found = gptq_binarize(weight, hessian, inverse_cholesky(hessian), sweeps=4).error
    rounded = fit_row_scales(weight @ hessian, power, torch.where(weight >= 0, 1.0, -1.0), hessian).error
    assert found.sum() - best.sum() < 0.35 * (rounded.sum() - best.sum())


def test_a_row_of_zeros_gets_a_positive_scale() -> None:
    weight, hessian = problem(3, 32)
    weight[1] = 0
    code = gptq_binarize(weight, hessian, inverse_cholesky(hessian), sweeps=1)
    assert bool((code.scale > 0).all())
    assert code.scale[1] < 1e-20


def test_every_start_finds_at_least_what_the_best_start_finds() -> None:
    weight, hessian = problem(40, 64, seed=5)
    factor = inverse_cholesky(hessian)
    one, every = (
        gptq_binarize(weight, hessian, factor, sweeps=2, refine_all=choice) for choice in (False, True)
    )
    assert bool((every.error <= one.error * (1 + 1e-5)).all())
    assert float(every.error.sum()) < 0.995 * float(one.error.sum())
    torch.testing.assert_close(
        every.error, error(weight, every.scale, every.sign, hessian).float(), rtol=1e-3, atol=1e-4
    )


def test_rows_in_parts_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(20, 32, seed=6)
    factor = inverse_cholesky(hessian)
    whole = gptq_binarize(weight, hessian, factor, sweeps=2, refine_all=True)
    monkeypatch.setattr(gptq_binary, "row_chunk_elements", lambda _: 7 * 32)
    parts = gptq_binarize(weight, hessian, factor, sweeps=2, refine_all=True)
    # Sums of other lengths may decide a tie otherwise.
    assert (whole.sign == parts.sign).float().mean() > 0.99
    torch.testing.assert_close(whole.error, parts.error, rtol=1e-3, atol=1e-4)

"""Signs and scales: the best rank-one approximation of |W|, within the bounds of the scales."""

from itertools import pairwise

import pytest
import torch
from bwla_converter.common import tensors
from bwla_converter.quantize.binarize import COLUMN_SCALE_RANGE, fit_scales, signs, unbiased
from torch import Tensor


def weights(rows: int = 48, columns: int = 96) -> Tensor:
    """Return Gaussian rows with row and column scales of different sizes."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(rows, columns, generator=generator)
    row = torch.rand(rows, 1, generator=generator) + 0.2
    return base * row * (torch.rand(columns, generator=generator) + 0.5)


def rebuild(weight: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return signs(weight) * row.unsqueeze(1) * column


def test_zero_counts_as_plus_one() -> None:
    assert signs(torch.tensor([[0.0, -0.0, -1e-30, 2.0]])).tolist() == [[1, 1, -1, 1]]
    assert signs(torch.zeros(1, 1)).dtype == torch.int8


def test_the_fit_reaches_the_best_rank_one_approximation() -> None:
    weight = weights()
    fit = fit_scales(weight, rounds=40)
    u, s, vh = torch.linalg.svd(weight.abs().double(), full_matrices=False)
    best = (weight.abs() - s[0] * u[:, :1] @ vh[:1]).norm() / weight.norm()
    assert fit.trace[-1] == pytest.approx(best.item(), abs=1e-6)


def test_every_round_lowers_the_error_and_the_trace_is_that_error() -> None:
    weight = weights()
    fit = fit_scales(weight)
    assert len(fit.trace) == 13
    assert all(after <= before + 1e-7 for before, after in pairwise(fit.trace))
    assert fit.trace[-1] < fit.trace[0] - 0.01
    error = (weight - rebuild(weight, fit.row, fit.column)).norm() / weight.norm()
    assert error.item() == pytest.approx(fit.trace[-1], abs=1e-6)


def test_row_scales_alone_are_the_mean_magnitudes() -> None:
    weight = weights()
    fit = fit_scales(weight, rounds=0)
    torch.testing.assert_close(fit.row, weight.abs().mean(1))
    assert torch.equal(fit.column, torch.ones(96))


def test_column_scales_have_geometric_mean_one() -> None:
    fit = fit_scales(weights())
    assert fit.column.double().log().mean().item() == pytest.approx(0.0, abs=1e-6)


def test_column_scales_are_bounded() -> None:
    weight = weights()
    weight[:, 0] *= 1e4
    weight[:, 1] *= 1e-6
    fit = fit_scales(weight)
    lowest, highest = COLUMN_SCALE_RANGE
    assert fit.column.max() / fit.column.min() <= highest / lowest * (1 + 1e-5)
    assert all(after <= before + 1e-7 for before, after in pairwise(fit.trace))


def test_zero_rows_and_columns_get_valid_scales() -> None:
    weight = weights()
    weight[5] = 0
    weight[:, 7] = 0
    fit = fit_scales(weight)
    assert 0 < fit.row[5] < 1e-20
    assert fit.column[7] == 1
    assert (fit.row > 0).all()
    assert fit.column.double().log().mean().item() == pytest.approx(0.0, abs=1e-6)


def test_a_weight_of_zeros_gets_valid_scales() -> None:
    fit = fit_scales(torch.zeros(3, 32))
    assert (fit.row > 0).all()
    assert torch.equal(fit.column, torch.ones(32))
    assert set(fit.trace) == {0.0}


def test_unbiased_scales_preserve_the_projection_on_every_row() -> None:
    weight = weights()
    weight[5] = 0
    least_squares = fit_scales(weight)
    corrected = unbiased(weight, least_squares)
    power = weight.square().sum(1)
    torch.testing.assert_close((rebuild(weight, corrected.row, corrected.column) * weight).sum(1), power)
    shrunk = (rebuild(weight, least_squares.row, least_squares.column) * weight).sum(1) / power
    away = power > 0
    assert shrunk[away].mean().item() == pytest.approx(2 / torch.pi, abs=0.03), "Gaussian rows"
    assert torch.equal(corrected.column, least_squares.column)
    assert 0 < corrected.row[5] < 1e-20


def test_the_correction_of_a_row_with_an_outlier_is_bounded() -> None:
    weight = weights()
    weight[4] = 0
    weight[4, 11] = 1.0
    corrected = unbiased(weight, fit_scales(weight))
    error = (weight - rebuild(weight, corrected.row, corrected.column))[4].norm() / weight[4].norm()
    assert error.item() == pytest.approx(1.0, abs=1e-4)


def test_chunks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_scales(weights())
    monkeypatch.setitem(tensors.CHUNK_ELEMENTS, "cpu", 5 * 96)
    chunked = fit_scales(weights())
    torch.testing.assert_close(whole.column, chunked.column)
    torch.testing.assert_close(whole.row, chunked.row)


def test_the_weight_is_not_modified() -> None:
    weight = weights()
    copy = weight.clone()
    fit_scales(weight)
    unbiased(weight, fit_scales(weight))
    signs(weight)
    assert torch.equal(weight, copy)

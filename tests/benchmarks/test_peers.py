"""The methods that accuracy.py compares with BWLA must be as good as published, or the comparison would be unfair."""

import pytest
import torch
from torch import Tensor

from benchmarks.quality.peers import GROUP, billm, grouped_one_bit, inverse_cholesky, row_errors

ROWS, COLUMNS = 24, 96


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """Return a weight, and a Hessian with a condition number of 100."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator))
    hessian = basis * torch.logspace(-1, 1, COLUMNS) @ basis.mT
    return torch.randn(ROWS, COLUMNS, generator=generator), hessian


@pytest.mark.parametrize("width", [16, 40, COLUMNS])
def test_grouped_gptq_stores_signs_and_one_scale_a_group(problem: tuple[Tensor, Tensor], width: int) -> None:
    weight, hessian = problem
    dequantized = grouped_one_bit(weight, hessian, inverse_cholesky(hessian), width)
    for part in dequantized.split(width, 1):
        assert torch.allclose(part.abs(), part[:, :1].abs().expand_as(part), rtol=1e-5)


def test_grouped_gptq_has_the_best_scales_for_its_signs(problem: tuple[Tensor, Tensor]) -> None:
    weight, hessian = problem
    dequantized = grouped_one_bit(weight, hessian, inverse_cholesky(hessian), 32)
    least = row_errors(dequantized, weight, hessian)
    for start in range(0, COLUMNS, 32):
        for factor in (0.98, 1.02):
            other = dequantized.clone()
            other[:, start : start + 32] *= factor
            assert (row_errors(other, weight, hessian) > least).all()


def test_grouped_gptq_uses_its_bits_and_its_hessian(problem: tuple[Tensor, Tensor]) -> None:
    weight, hessian = problem
    factor = inverse_cholesky(hessian)
    by_width = [
        row_errors(grouped_one_bit(weight, hessian, factor, w), weight, hessian).sum() for w in (96, 32, 8)
    ]
    assert by_width[0] > by_width[1] > by_width[2]
    plain = grouped_one_bit(weight, torch.eye(COLUMNS), torch.eye(COLUMNS), 32)
    assert row_errors(plain, weight, hessian).sum() > by_width[1]


def test_billm_counts_what_it_stores(problem: tuple[Tensor, Tensor]) -> None:
    weight, hessian = problem
    part = billm(weight, inverse_cholesky(hessian))
    rounded = weight.abs().mean(1, keepdim=True) * weight.sign()
    assert row_errors(part.values, weight, hessian).sum() < row_errors(rounded, weight, hessian).sum()
    # A sign and a membership bit per weight, four scales per row, the mask of columns; salient columns add to these.
    least = 2 + 4 * 16 / COLUMNS + 1 / ROWS
    assert least <= part.bits <= least + 16 / COLUMNS
    assert COLUMNS <= GROUP

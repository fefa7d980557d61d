"""Moments against plain formulas: Gram matrices of all batches at once, the damped Hessian, and its rotation."""

import pytest
import torch
from bwla_converter.quantize.moments import Moments, rotate_hessian
from bwla_kernels.errors import SourceError
from bwla_kernels.reference import rotate
from random_tensors import normal

WIDTH, OUTPUTS = 24, 10


def empty(cross_gram: bool = True) -> Moments:
    return Moments.zeros(WIDTH, torch.device("cpu"), cross_gram=cross_gram)


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_batches_add_up_to_the_gram_matrices_of_all_tokens(batch: int) -> None:
    x, x_hat = normal(40, WIDTH), normal(40, WIDTH, seed=5)
    error = normal(40, OUTPUTS, seed=2)
    moments = empty()
    for part_hat, part, part_error in zip(
        *(tensor.split(batch) for tensor in (x_hat, x, error)), strict=True
    ):
        moments.add(part_hat, part)
        moments.add_error(part_hat, part_error)
    assert moments.count == 40
    torch.testing.assert_close(moments.gram, x_hat.mT @ x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.cross_gram, x.mT @ x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.error_cross_gram, error.mT @ x_hat, rtol=1e-4, atol=1e-4)


def test_the_gram_matrix_is_the_same_from_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x_hat, whole, blocks = normal(40, WIDTH), empty(), empty()
    whole.add(x_hat)
    monkeypatch.setattr("bwla_converter.quantize.moments.SMALLEST_GRAM_BLOCK", 7)
    blocks.add(x_hat)
    torch.testing.assert_close(blocks.gram, whole.gram)
    torch.testing.assert_close(blocks.gram, blocks.gram.mT)


def test_leading_axes_and_half_precision_are_accepted() -> None:
    x_hat = normal(2, 5, WIDTH).bfloat16()
    moments = empty()
    moments.add(x_hat, x_hat)
    assert moments.count == 10
    assert moments.gram.dtype == torch.float32
    assert torch.equal(moments.gram, moments.cross_gram)


def test_without_the_original_model_there_is_no_cross_gram() -> None:
    moments = empty(cross_gram=False)
    moments.add(normal(5, WIDTH), normal(5, WIDTH, seed=5))
    assert moments.cross_gram is None
    assert moments.error_cross_gram is None


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_the_hessian_is_the_mean_gram_matrix_with_a_damped_diagonal(damping: float) -> None:
    x_hat = normal(60, WIDTH)
    moments = empty()
    moments.add(x_hat)
    mean = x_hat.mT @ x_hat / 60
    expected = mean + damping * mean.diagonal().mean() * torch.eye(WIDTH)
    torch.testing.assert_close(moments.hessian(damping), expected, rtol=1e-4, atol=1e-5)


def test_the_hessian_gives_the_output_error() -> None:
    x_hat, error = normal(60, WIDTH), normal(OUTPUTS, WIDTH, seed=5)
    moments = empty()
    moments.add(x_hat)
    by_hessian = torch.trace(error @ moments.hessian(0.0) @ error.mT)
    torch.testing.assert_close(by_hessian, (x_hat @ error.mT).square().sum() / 60, rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [None, 0.0, float("nan"), float("inf")])
def test_inputs_without_information_are_refused(value: float | None) -> None:
    moments = empty()
    if value is not None:
        moments.add(torch.full((3, WIDTH), value))
    with pytest.raises(SourceError, match=f"expected finite, nonzero inputs, found {moments.count} tokens"):
        moments.hessian(0.01)


def test_the_rotated_hessian_measures_rotated_rows_as_the_hessian_measures_rows() -> None:
    left, right = (torch.linalg.qr(normal(2, n, n, seed=n)).Q for n in (3, 4))
    mix, rows = normal(WIDTH, WIDTH), normal(3, WIDTH, seed=5)
    hessian, rotated = mix @ mix.mT, rotate(rows, left, right)
    rotated_hessian = rotate_hessian(hessian, left, right)
    torch.testing.assert_close(
        ((rotated @ rotated_hessian) * rotated).sum(1), ((rows @ hessian) * rows).sum(1), rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(rotated_hessian, rotated_hessian.mT, rtol=1e-4, atol=1e-3)

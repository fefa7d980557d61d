"""Known distributions give their known figures; a rotation changes what it must and keeps what it must."""

import pytest
import torch
from bwla_converter.common.tensors import sample_rows
from bwla_converter.report.statistics import (
    BINS,
    Distribution,
    activation_statistics,
    describe,
    row_figures,
    weight_statistics,
)
from bwla_kernels.reference import rotate_back

TWO_PEAKS = torch.tensor([1.0, -1.0]).repeat(8, 512)


def rows(kind: str, count: int = 64, width: int = 4096) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "gaussian":
        return torch.randn(count, width, generator=generator)
    if kind == "uniform":
        return torch.rand(count, width, generator=generator) - 0.5
    return torch.empty(count, width).exponential_(generator=generator)


def identity(order: int) -> torch.Tensor:
    return torch.eye(order).unsqueeze(0)


@pytest.mark.parametrize(
    ("kind", "kurtosis", "bimodality", "error"),
    [
        ("gaussian", 3.0, 1 / 3, 1 - 2 / torch.pi),
        ("uniform", 1.8, 5 / 9, 1 / 4),
        ("exponential", 9.0, 5 / 9, 1 / 2),  # skewness 2: (4 + 1) / 9
    ],
)
def test_known_distributions(kind: str, kurtosis: float, bimodality: float, error: float) -> None:
    distribution = describe([rows(kind)], 4.0)
    assert distribution.kurtosis == pytest.approx(kurtosis, rel=0.05)
    assert distribution.bimodality == pytest.approx(bimodality, rel=0.03)
    assert distribution.binarization_error == pytest.approx(error, rel=0.02)


def test_two_values_are_as_bimodal_as_can_be() -> None:
    distribution = describe([TWO_PEAKS], 4.0)
    assert distribution.kurtosis == pytest.approx(1.0)
    # The sample correction makes it a little more than 1.
    assert distribution.bimodality == pytest.approx(1.0, abs=0.01)
    assert distribution.binarization_error == pytest.approx(0.0, abs=1e-9)
    assert distribution.peak == pytest.approx(1.0)


def test_the_sample_correction_is_that_of_the_definition() -> None:
    row = torch.tensor([[0.0, 1.0, 1.0, 2.0, 7.0, -3.0]])
    x = row.double()[0]
    n, centred = 6, x - x.mean()
    g1 = float((centred**3).mean() / (centred**2).mean() ** 1.5) * (n * (n - 1)) ** 0.5 / (n - 2)
    k = float((centred**4).sum()) * n * (n + 1) / ((n - 1) * (n - 2) * (n - 3)) / float(x.var()) ** 2
    excess = k - 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))
    expected = (g1**2 + 1) / (excess + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))
    assert float(row_figures(row)[0, 1]) == pytest.approx(expected)


def test_histograms_count_every_value() -> None:
    distribution = describe([rows("gaussian", 8), rows("exponential", 8)], 4.0)
    assert len(distribution.histogram) == BINS
    assert sum(distribution.histogram) + distribution.outside == pytest.approx(1.0, abs=1e-5)
    assert distribution.outside > 0
    # The scale of a row does not matter.
    assert (
        describe([rows("gaussian", 8) * 7], 4.0).histogram == describe([rows("gaussian", 8)], 4.0).histogram
    )


def test_rows_without_variance_do_no_harm() -> None:
    distribution = describe([torch.zeros(3, 64)], 4.0)
    assert (distribution.kurtosis, distribution.bimodality, distribution.peak) == (0.0, 0.0, 0.0)
    mixed = describe([torch.cat([torch.zeros(1, 1024), TWO_PEAKS])], 4.0)
    assert mixed.kurtosis == pytest.approx(1.0)


def test_samples_are_whole_rows_evenly_spaced_and_always_the_same() -> None:
    table = torch.arange(100.0).unsqueeze(1).expand(100, 8)
    assert sample_rows(table, 800) is table
    assert sample_rows(table, 40)[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert len(sample_rows(table, 1)) == 1


def test_the_right_rotation_shows_two_peaks_and_the_column_scale_is_divided_out() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(1, order, order, generator=generator)).Q for order in (16, 32))
    beta = torch.rand(512, generator=generator) + 0.5
    signs = torch.randint(0, 2, (256, 512), generator=generator) * 2.0 - 1
    weight = rotate_back(signs * beta, left, right)
    change = weight_statistics(weight.bfloat16(), left, right, beta)
    assert change.before.kurtosis == pytest.approx(3.0, rel=0.1)
    assert change.after.kurtosis == pytest.approx(1.0, abs=0.02)
    assert change.after.bimodality > 0.95
    assert change.after.binarization_error < 0.01 < change.before.binarization_error


def test_an_outlier_channel_is_spread_over_the_token() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 32, 512, generator=generator)
    x[..., 7] *= 100
    left, right = (torch.linalg.qr(torch.randn(1, order, order, generator=generator)).Q for order in (16, 32))
    change = activation_statistics(x, left, right, torch.ones(512))
    assert change.before.peak > 15 > 8 > change.after.peak
    assert change.before.peak_p99 >= change.before.peak
    unchanged = activation_statistics(x, identity(16), identity(32), torch.ones(512))
    assert isinstance(unchanged.after, Distribution)
    assert unchanged.after == unchanged.before

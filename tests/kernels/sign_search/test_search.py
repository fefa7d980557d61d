"""The search as a whole: its error is the one that it reports, and small."""

import itertools

import pytest
import torch
from bwla_kernels.sign_search import BinaryWeight, Effort, Metric, Target, gptq_binarize, search
from hessians import correlated
from torch import Tensor

ONE = Effort((1.0,), ((1, 2),))
SEVERAL = Effort((0.75, 1.0, 1.3), ((2, 1), (1, 2)))
NO_FEEDBACK = Effort((), ((1, 2),))


def binarize(weight: Tensor, hessian: Tensor, effort: Effort) -> BinaryWeight:
    metric = Metric.of(hessian)
    return gptq_binarize(Target.of(weight, metric), metric, effort)


def error(weight: Tensor, binary: BinaryWeight, hessian: Tensor) -> Tensor:
    rest = (weight - binary.dequantize()).double()
    return ((rest @ hessian.double()) * rest).sum(1).float()


@pytest.mark.parametrize("columns", [30, 64, 320])
@pytest.mark.parametrize(
    "effort", [ONE, SEVERAL, NO_FEEDBACK, Effort((1.0, 1.2), ()), Effort((), ())], ids=str
)
def test_the_error_is_the_one_reported_and_scales_are_the_best(columns: int, effort: Effort) -> None:
    weight, hessian = correlated(7, columns)
    binary = binarize(weight, hessian, effort)
    assert set(binary.sign.unique().tolist()) == {-1.0, 1.0}
    here = error(weight, binary, hessian)
    torch.testing.assert_close(binary.error, here, rtol=1e-3, atol=1e-3)
    for factor in (0.99, 1.01):
        other = BinaryWeight(binary.sign, binary.scale * factor, binary.error)
        assert bool((error(weight, other, hessian) > here).all())


def test_every_part_of_the_search_lowers_the_error() -> None:
    weight, hessian = correlated(60, 160, seed=5)
    efforts = (Effort((), ()), NO_FEEDBACK, Effort((1.0,), ()), ONE, SEVERAL)
    rounded, swept, fed_back, one, several = (
        float(binarize(weight, hessian, e).error.sum()) for e in efforts
    )
    assert several < one < fed_back < rounded
    assert swept < rounded


def test_close_to_the_best_of_all_signs() -> None:
    """Ten columns: all 1,024 patterns can be tried, each with its best scale."""
    weight, hessian = correlated(40, 10, seed=3)
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)))
    dots = weight @ hessian @ patterns.mT
    norms = ((patterns @ hessian) * patterns).sum(1)
    power = ((weight @ hessian) * weight).sum(1)
    best = (power.unsqueeze(1) - dots.clamp_min(0).square() / norms).min(1).values
    found = binarize(weight, hessian, Effort((0.75, 1.0, 1.3, 1.7), ((1, 4),))).error
    rounded = binarize(weight, hessian, Effort((), ())).error
    assert found.sum() - best.sum() < 0.35 * (rounded.sum() - best.sum())


def test_a_row_of_zeros_gets_a_positive_scale() -> None:
    weight, hessian = correlated(3, 32)
    weight[1] = 0
    binary = binarize(weight, hessian, SEVERAL)
    assert bool((binary.scale > 0).all())
    assert binary.scale[1] < 1e-20
    assert float(binary.error[1].abs()) <= 1e-6


def test_rows_in_parts_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = correlated(20, 32, seed=6)
    whole = binarize(weight, hessian, SEVERAL)
    monkeypatch.setattr(search, "row_chunk_elements", lambda _: 7 * 32)
    parts = binarize(weight, hessian, SEVERAL)
    # Sums of other lengths may decide a tie otherwise.
    assert (whole.sign == parts.sign).float().mean() > 0.99
    torch.testing.assert_close(whole.error, parts.error, rtol=1e-3, atol=1e-4)


def test_the_best_candidates_of_each_row_are_kept() -> None:
    dots = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])
    sign = torch.arange(6.0).view(1, 3, 2).expand(5, 3, 2).contiguous()
    best = search.Candidates(sign, dots, torch.ones_like(dots)).best(2)
    assert best.dots.tolist() == [[3.0, 3.0], [2.0, 2.0]]
    assert best.sign[0].tolist() == [[4.0, 1.0], [2.0, 3.0]]


def test_the_work_is_counted() -> None:
    assert (SEVERAL.products, SEVERAL.sweeps) == (0.5 * 4 + 2 + 2, 2 * 1 + 2)
    assert (NO_FEEDBACK.products, NO_FEEDBACK.sweeps) == (1 + 2, 2)

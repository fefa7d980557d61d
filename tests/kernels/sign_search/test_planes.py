"""The search for several planes as a whole: its error is the one that it reports, and falls with every plane."""

import pytest
import torch
from bwla_kernels.sign_search import BinaryWeight, Effort, Metric, Target, gptq_binarize, search
from hessians import correlated
from torch import Tensor

EFFORT = Effort((1.0, 1.3), ((1, 4),), plane_factors=(0.9, 1.0))


def binarize(weight: Tensor, hessian: Tensor, planes: int) -> BinaryWeight:
    metric = Metric.of(hessian)
    return gptq_binarize(Target.of(weight, metric), metric, EFFORT, planes)


def error(weight: Tensor, value: Tensor, hessian: Tensor) -> Tensor:
    rest = (weight - value).double()
    return ((rest @ hessian.double()) * rest).sum(1).float()


@pytest.mark.parametrize("columns", [30, 64, 320])
@pytest.mark.parametrize("planes", [2, 3, 4])
def test_the_error_is_the_one_reported_and_scales_are_the_best(planes: int, columns: int) -> None:
    weight, hessian = correlated(7, columns)
    found = binarize(weight, hessian, planes)
    assert found.sign.shape == (7, planes, columns)
    assert set(found.sign.unique().tolist()) == {-1.0, 1.0}
    assert bool((found.scale > 0).all())
    assert bool((found.scale.diff(dim=1) <= 0).all()), "scales are in descending order"
    here = error(weight, found.dequantize(), hessian)
    torch.testing.assert_close(found.error, here, rtol=2e-2, atol=1e-3 * float(here.max()))
    for plane in range(planes):
        for factor in (0.97, 1.03):
            scale = found.scale.clone()
            scale[:, plane] *= factor
            other = BinaryWeight(found.sign, scale, found.error)
            assert bool((error(weight, other.dequantize(), hessian) > here).all())


def test_every_plane_cuts_the_error() -> None:
    weight, hessian = correlated(60, 160, seed=5)
    errors = [float(binarize(weight, hessian, planes).error.sum()) for planes in (1, 2, 3, 4)]
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert more < 0.45 * fewer


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = correlated(40, 64)
    whole = binarize(weight, hessian, 2)
    monkeypatch.setattr(search, "row_chunk_elements", lambda device: 64 * 2 * 16)
    parts = binarize(weight, hessian, 2)
    assert torch.equal(whole.sign, parts.sign)
    torch.testing.assert_close(whole.scale, parts.scale)


def test_rows_of_zeros_get_positive_scales() -> None:
    weight, hessian = correlated(5, 64)
    weight[2] = 0
    found = binarize(weight, hessian, 3)
    assert bool((found.scale > 0).all())
    assert bool(torch.isfinite(found.error).all())
    assert float(found.dequantize()[2].abs().max()) < 1e-6

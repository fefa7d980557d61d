"""The triangular form of the output error, and the products of a weight with it."""

import torch
from bwla_kernels.sign_search import Metric, Target
from hessians import correlated


def test_the_factors_are_those_of_the_hessian() -> None:
    _, hessian = correlated(1, 40)
    metric = Metric.of(hessian)
    assert torch.equal(metric.factor, metric.factor.triu())
    assert torch.equal(metric.factor.diagonal(), torch.ones(40))
    torch.testing.assert_close(
        (metric.factor * metric.pivots) @ metric.factor.mT, hessian, rtol=1e-4, atol=1e-5
    )


def test_scaled_columns_need_no_new_factorization() -> None:
    weight, hessian = correlated(5, 40)
    column = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.5
    metric, expected = Metric.of(hessian).scaled(column), Metric.of(column.unsqueeze(1) * hessian * column)
    for name in ("hessian", "factor", "pivots"):
        torch.testing.assert_close(getattr(metric, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    target = Target.of(weight, Metric.of(hessian)).scaled(column)
    torch.testing.assert_close(
        target.hessian_product, Target.of(weight / column, metric).hessian_product, rtol=1e-4, atol=1e-4
    )


def test_a_low_rank_correction_is_subtracted() -> None:
    weight, hessian = correlated(5, 40)
    b, a = torch.randn(5, 2), torch.randn(2, 40)
    metric = Metric.of(hessian)
    target, expected = Target.of(weight, metric).minus(b, a, metric), Target.of(weight - b @ a, metric)
    torch.testing.assert_close(target.weight, expected.weight)
    torch.testing.assert_close(target.hessian_product, expected.hessian_product, rtol=1e-4, atol=1e-4)
    power = ((expected.weight @ hessian) * expected.weight).sum(1)
    torch.testing.assert_close(target.norms(), power, rtol=1e-4, atol=1e-4)

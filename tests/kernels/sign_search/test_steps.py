"""The reference implementations of the steps: error feedback is GPTQ's rule, a sweep lowers the error."""

import pytest
import torch
from bwla_kernels.sign_search import Metric, Target
from bwla_kernels.sign_search.steps import choose_signs_reference, flip_signs_reference
from hessians import correlated
from torch import Tensor


def error(weight: Tensor, scale: Tensor, sign: Tensor, hessian: Tensor) -> Tensor:
    rest = (weight - scale.unsqueeze(1) * sign).double()
    return ((rest @ hessian.double()) * rest).sum(1)


@pytest.mark.parametrize("columns", [16, 200])
def test_feedback_is_the_column_by_column_rule(columns: int) -> None:
    """GPTQ's rule in its plainest form: after column j the best rest given what was lost so far."""
    weight, hessian = correlated(3, columns)
    weight, hessian, scale = weight.double(), hessian.double(), torch.full((3,), 0.7, dtype=torch.float64)
    work, inverse, expected = weight.clone(), torch.linalg.inv(hessian), torch.empty_like(weight)
    for j in range(columns):
        expected[:, j] = torch.where(work[:, j] >= 0, 1.0, -1.0)
        lost = (work[:, j] - scale * expected[:, j]) / inverse[0, 0]
        work[:, j:] -= lost.unsqueeze(1) * inverse[0]
        inverse = inverse[1:, 1:] - inverse[1:, :1] @ inverse[:1, 1:] / inverse[0, 0]
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    pivots = upper.diagonal().square()
    factor = upper / upper.diagonal()
    sign = torch.empty(columns, 1, 3, dtype=torch.float64)
    dots, norms = torch.zeros(2, 1, 3, dtype=torch.float64)
    choose_signs_reference(
        (weight @ factor).mT, torch.zeros_like(sign), factor, pivots, scale.unsqueeze(0), sign, dots, norms
    )
    assert torch.equal(sign[:, 0].mT, expected)
    torch.testing.assert_close(dots[0], ((weight @ hessian) * expected).sum(1))
    torch.testing.assert_close(norms[0], ((expected @ hessian) * expected).sum(1))


@pytest.mark.parametrize("columns", [30, 300])
def test_a_sweep_never_raises_the_error_and_ends_where_no_flip_helps(columns: int) -> None:
    weight, hessian = correlated(6, columns)
    target = Target.of(weight, Metric.of(hessian))
    sign = torch.where(weight >= 0, 1.0, -1.0).mT.unsqueeze(1).contiguous()
    product = (hessian @ sign[:, 0]).unsqueeze(1)
    dots = (sign[:, 0] * target.hessian_product).sum(0, keepdim=True)
    norms = (sign * product).sum(0)
    scale, change = dots / norms, torch.empty_like(sign)
    before = error(weight, scale[0], sign[:, 0].mT, hessian)
    for _ in range(50):
        flip_signs_reference(target.hessian_product, product, hessian, scale, sign, change, dots, norms)
        after = error(weight, scale[0], sign[:, 0].mT, hessian)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
        if not bool(change.any()):
            break
    else:
        raise AssertionError("coordinate descent did not end")
    torch.testing.assert_close(product[:, 0], hessian @ sign[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dots[0], (sign[:, 0] * target.hessian_product).sum(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norms[0], (sign * product)[:, 0].sum(0), rtol=1e-3, atol=1e-3)
    for j in range(columns):
        other = sign[:, 0].mT.clone()
        other[:, j] *= -1
        assert bool((error(weight, scale[0], other, hessian) >= before * (1 - 1e-4)).all())

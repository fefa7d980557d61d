"""The reference steps for several planes: the nearest level is chosen, and a sweep never raises the error."""

import itertools

import pytest
import torch
from bwla_kernels.sign_search import Metric, Target
from bwla_kernels.sign_search.levels import choose_levels_reference, nearest_level, sweep_levels_reference
from hessians import correlated
from torch import Tensor


def error(weight: Tensor, value: Tensor, hessian: Tensor) -> Tensor:
    rest = (weight - value).double()
    return ((rest @ hessian.double()) * rest).sum(1)


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_the_nearest_of_all_levels_is_chosen(planes: int) -> None:
    generator = torch.Generator().manual_seed(planes)
    wanted, scale = torch.randn(50, generator=generator), torch.rand(planes, 50, generator=generator)
    sign = nearest_level(wanted, scale, torch.zeros_like(scale), torch.full((50,), float("inf")))
    levels = torch.stack(
        [(torch.tensor(p).unsqueeze(1) * scale).sum(0) for p in itertools.product((-1.0, 1.0), repeat=planes)]
    )
    best = (levels - wanted).abs().min(0).values
    torch.testing.assert_close(((sign * scale).sum(0) - wanted).abs(), best)


def test_a_level_is_kept_unless_another_is_nearer() -> None:
    scale, sign = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
    kept = nearest_level(torch.tensor([0.1]), scale, sign, torch.tensor([0.01]))
    assert torch.equal(kept, sign), "the other order of signs has the same level"


@pytest.mark.parametrize("planes", [2, 3])
def test_feedback_is_the_column_by_column_rule(planes: int) -> None:
    """GPTQ's rule in its plainest form, with the nearest level in place of the sign."""
    columns, rows = 40, 3
    weight, hessian = (tensor.double() for tensor in correlated(rows, columns))
    scale = 0.8 * 0.5 ** torch.arange(planes, dtype=torch.float64).unsqueeze(1).expand(-1, rows).contiguous()
    work, inverse, expected = weight.clone(), torch.linalg.inv(hessian), torch.empty_like(weight)
    for j in range(columns):
        far = torch.full((rows,), float("inf"), dtype=torch.float64)
        chosen = nearest_level(work[:, j], scale, torch.zeros_like(scale), far)
        expected[:, j] = (chosen * scale).sum(0)
        work[:, j:] -= ((work[:, j] - expected[:, j]) / inverse[0, 0]).unsqueeze(1) * inverse[0]
        inverse = inverse[1:, 1:] - inverse[1:, :1] @ inverse[:1, 1:] / inverse[0, 0]
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    factor, pivots = upper / upper.diagonal(), upper.diagonal().square()
    sign = torch.empty(columns, planes, rows, dtype=torch.float64)
    dots, norms = torch.zeros_like(scale), torch.zeros(planes, planes, rows, dtype=torch.float64)
    choose_levels_reference(
        (weight @ factor).mT, torch.zeros_like(sign), factor, pivots, scale, sign, dots, norms
    )
    torch.testing.assert_close((sign * scale).sum(1).mT, expected)
    product = torch.einsum("kl,lpn->kpn", hessian, sign)
    torch.testing.assert_close(dots, (sign * (hessian @ weight.mT).unsqueeze(1)).sum(0))
    torch.testing.assert_close(norms, torch.einsum("kpn,kqn->pqn", sign, product))


@pytest.mark.parametrize("columns", [30, 300])
def test_a_sweep_never_raises_the_error_and_ends_where_no_move_helps(columns: int) -> None:
    weight, hessian = correlated(6, columns)
    target = Target.of(weight, Metric.of(hessian))
    scale = torch.tensor([[0.9], [0.45]]).expand(-1, 6).contiguous()
    sign = torch.where(torch.randn(columns, 2, 6, generator=torch.Generator().manual_seed(1)) > 0, 1.0, -1.0)
    product = torch.einsum("kl,lpn->kpn", hessian, sign)
    dots = (sign * target.hessian_product.unsqueeze(1)).sum(0)
    norms, change = torch.einsum("kpn,kqn->pqn", sign, product), torch.zeros_like(sign)

    def value(signs: Tensor) -> Tensor:
        return (signs * scale).sum(1).mT

    before = error(weight, value(sign), hessian)
    for _ in range(60):
        sweep_levels_reference(target.hessian_product, product, hessian, scale, sign, change, dots, norms)
        after = error(weight, value(sign), hessian)
        assert bool((after <= before * (1 + 1e-3)).all())
        before = after
        if not bool(change.any()):
            break
    else:
        raise AssertionError("coordinate descent did not end")
    torch.testing.assert_close(
        dots, (sign * target.hessian_product.unsqueeze(1)).sum(0), rtol=1e-3, atol=1e-2
    )
    for j in range(0, columns, 7):
        for pattern in itertools.product((-1.0, 1.0), repeat=2):
            other = sign.clone()
            other[j] = torch.tensor(pattern).unsqueeze(1)
            assert bool((error(weight, value(other), hessian) >= before * (1 - 1e-2)).all())

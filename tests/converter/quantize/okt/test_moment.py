"""The fifth absolute moment: its value, its targets, and the tangent that bounds it."""

import pytest
import torch
from bwla_converter.quantize.okt.moment import POWER, MomentObjective, moments_of
from random_tensors import make_generator, normal


def chunks() -> tuple[torch.Tensor, ...]:
    """Return two chunks of rows [G, n1, rows, n2]."""
    return normal(1, 4, 3, 8), normal(1, 4, 5, 8, seed=2)


@pytest.mark.parametrize("power", [3, 4, 5, 6])
def test_the_value_is_the_mean_over_all_weights_of_nonzero_rows(power: int) -> None:
    objective = MomentObjective.start(chunks(), power)
    expected = torch.cat([chunk.flatten() for chunk in chunks()]).double().abs().pow(power).mean()
    assert objective.fitted(chunks())[1] == pytest.approx(float(expected), rel=1e-6)
    padded = (*chunks(), torch.zeros(1, 4, 2, 8))
    assert objective.fitted(padded)[1] == pytest.approx(float(expected), rel=1e-6)
    assert MomentObjective.start(padded[2:]).fitted(padded[2:])[1] == 0


def test_the_moment_of_a_row() -> None:
    cells = normal(4, 3, 8)
    expected = cells.double().abs().pow(POWER).mean((0, 2))
    torch.testing.assert_close(moments_of(cells), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("power", [4, 5])
def test_targets_are_the_gradient_of_the_convex_function(power: int) -> None:
    rows = chunks()
    objective = MomentObjective.start(rows, power)
    for chunk, target in zip(rows, objective.targets(rows), strict=True):
        leaf = chunk.double().requires_grad_(True)
        (objective.curvature * leaf.square() / 2 - leaf.abs().pow(power) / power).sum().backward()
        torch.testing.assert_close(target.double(), leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [3, 4, 5, 6])
def test_the_tangent_bounds_the_convex_function_up_to_the_largest_weight(power: int) -> None:
    rows = chunks()
    objective = MomentObjective.start(rows, power)
    largest = max(float(chunk.abs().max()) for chunk in rows)

    def function(w: torch.Tensor) -> torch.Tensor:
        return objective.curvature * w.square() / 2 - w.abs().pow(power) / power

    for chunk, target in zip(rows, objective.targets(rows), strict=True):
        other = (2 * torch.rand(chunk.shape, generator=make_generator(4)) - 1) * largest
        tangent = function(chunk.double()) + target.double() * (other - chunk).double()
        assert bool((function(other.double()) >= tangent - 1e-4 * objective.curvature).all())


def test_no_rows_and_rows_of_zeros_have_no_curvature() -> None:
    for rows in ((), (torch.zeros(1, 4, 0, 8),), (torch.zeros(1, 4, 2, 8),)):
        fitted, value = MomentObjective.start(rows).fitted(rows)
        assert (fitted.curvature, value) == (0.0, 0.0)


def test_the_curvature_is_that_of_the_largest_weight_and_follows_it() -> None:
    rows = chunks()
    objective = MomentObjective.start(rows)
    assert objective.curvature == pytest.approx(4 * max(float(chunk.abs().max()) for chunk in rows) ** 3)
    halved = tuple(chunk / 2 for chunk in rows)
    assert objective.fitted(halved)[0].curvature == pytest.approx(objective.curvature / 8)

"""Levels of several planes: the nearest one is chosen, what is stored is that level, and gradients pass through it."""

import itertools

import pytest
import torch
from bwla_converter.training import levels
from bwla_converter.training.levels import (
    MARGIN,
    Levels,
    PlanesProduct,
    in_descending_order,
    level_unit,
    planes_product,
    sum_of_planes,
)
from bwla_kernels.precision import product_dtype
from torch import Tensor

ROWS, COLUMNS = 12, 64


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.fixture(params=[1, 2, 3, 4])
def scale(request: pytest.FixtureRequest, generator: torch.Generator) -> Tensor:
    """Scales [N, P]. In some rows, other levels are nearer than those that a greedy choice of signs finds."""
    scale = 0.2 + torch.rand(ROWS, request.param, generator=generator)
    return scale.sort(dim=1, descending=True).values


def all_levels(scale: Tensor) -> Tensor:
    codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=scale.shape[1])))
    return scale @ codes.mT


def random_latent(scale: Tensor, generator: torch.Generator) -> Tensor:
    return 2.0 ** scale.shape[1] * (2.0 * torch.rand(ROWS, COLUMNS, generator=generator) - 1.0)


def random_signs(scale: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, (*scale.shape, COLUMNS), generator=generator)
    return (2 * bits - 1).to(torch.int8)


def test_a_latent_weight_counts_as_the_nearest_level(scale: Tensor, generator: torch.Generator) -> None:
    latent = random_latent(scale, generator)
    distance = (latent * level_unit(scale)).unsqueeze(2) - all_levels(scale).unsqueeze(1)
    nearest = all_levels(scale).gather(1, distance.abs().argmin(2))
    found = Levels.of(scale)
    torch.testing.assert_close(found.weights(latent), nearest)
    signs = found.plane_signs(latent)
    assert signs.dtype == torch.int8
    assert signs.abs().eq(1).all()
    torch.testing.assert_close(sum_of_planes(signs, scale), nearest)


def test_units_are_those_of_one_plane_for_evenly_spaced_levels() -> None:
    scale = torch.tensor([[4.0, 2.0, 1.0]])
    found = Levels.of(scale)
    assert float(found.unit) == 1.0
    assert found.values.tolist() == [[1.0, 3.0, 5.0, 7.0]]
    assert found.thresholds.tolist() == [[2.0, 4.0, 6.0]]
    assert found.bound == 8
    one = Levels.of(torch.tensor([[3.0]]))
    assert (float(one.unit), one.values.tolist(), one.bound) == (3.0, [[3.0]], 2)


def test_latents_start_in_the_cells_of_the_levels_that_were_chosen(
    scale: Tensor, generator: torch.Generator
) -> None:
    signs, latent, found = random_signs(scale, generator), random_latent(scale, generator), Levels.of(scale)
    weights = sum_of_planes(signs, scale)
    start = found.move_inside(latent, weights)
    torch.testing.assert_close(found.weights(start), weights)
    assert torch.equal(found.plane_signs(start), signs)
    assert float(start.abs().max()) <= found.bound
    own = found.weights(latent)
    settled = found.move_inside(latent, own)
    assert float((settled - latent).abs().max()) <= MARGIN + 1e-5
    assert torch.equal(found.move_inside(settled, own), settled)


def test_the_scales_have_the_true_gradient(scale: Tensor, generator: torch.Generator) -> None:
    """For the levels that were chosen, as finite differences: small steps do not choose others."""
    x = torch.randn(5, COLUMNS, generator=generator, dtype=torch.float64)
    output_gradient = torch.randn(5, ROWS, generator=generator, dtype=torch.float64)
    for weights in (random_signs(scale, generator), random_latent(scale, generator).double()):
        exact = scale.double().requires_grad_()
        product = PlanesProduct.apply(x, weights, exact, torch.float64)
        (gradient,) = torch.autograd.grad((product * output_gradient).sum(), exact)
        fixed = weights
        if weights.is_floating_point():
            fixed = Levels.of(exact.detach()).plane_signs(weights)

        def loss(moved: Tensor, fixed: Tensor = fixed) -> Tensor:
            return (x @ sum_of_planes(fixed, moved).mT * output_gradient).sum()

        for row, plane in itertools.product((0, 7), range(scale.shape[1])):
            step = torch.zeros_like(exact)
            step[row, plane] = 1e-4
            slope = float(loss(exact.detach() + step) - loss(exact.detach() - step)) / 2e-4
            assert float(gradient[row, plane]) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("shape", [(7, COLUMNS), (2, 3, COLUMNS)])
def test_inputs_and_latents_get_the_gradients_of_a_matrix_product(
    scale: Tensor, generator: torch.Generator, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=generator, requires_grad=True)
    latent = random_latent(scale, generator).requires_grad_()
    output_gradient = torch.randn(*shape[:-1], ROWS, generator=generator)
    product = planes_product(x, latent, scale)
    (product * output_gradient).sum().backward()
    weights = Levels.of(scale).weights(latent.detach())
    expected_x = output_gradient @ weights
    expected_latent = output_gradient.flatten(0, -2).mT @ x.detach().flatten(0, -2) * level_unit(scale)
    bound = 4 * torch.finfo(product_dtype(x.device)).eps
    assert float((product.detach() - x.detach() @ weights.mT).norm() / product.detach().norm()) < bound
    for gradient, expected in ((x.grad, expected_x), (latent.grad, expected_latent)):
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert float((gradient - expected).norm() / expected.norm()) < bound


def test_latents_are_not_pushed_out_of_their_range() -> None:
    latent = torch.tensor([5.0, 5.0, -5.0, -5.0, 1.0], requires_grad=True)
    scale = torch.tensor([[2.0, 1.0]]).repeat(5, 1)
    product = PlanesProduct.apply(torch.ones(1, 1), latent.unsqueeze(1), scale, torch.float32)
    (product * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])).sum().backward()
    # A step is opposite to the gradient, so it leads outwards where gradient and latent differ in sign.
    assert latent.grad is not None
    assert latent.grad.tolist() == [1.0, 0.0, 0.0, -1.0, 1.0]


def test_without_gradients_the_product_is_exact(
    scale: Tensor, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "product_dtype", lambda device: torch.bfloat16)
    x, signs = torch.randn(3, COLUMNS, generator=generator), random_signs(scale, generator)
    expected = x @ sum_of_planes(signs, scale).mT
    with torch.no_grad():
        torch.testing.assert_close(planes_product(x, signs, scale), expected)
    rounded = planes_product(x, signs, scale.requires_grad_())
    assert 1e-4 < float((rounded - expected).norm() / expected.norm()) < 2e-2


def test_planes_are_put_in_descending_order(scale: Tensor, generator: torch.Generator) -> None:
    signs = random_signs(scale, generator)
    order = torch.randperm(scale.shape[1], generator=generator)
    sorted_signs, sorted_scale = in_descending_order(signs[:, order], scale[:, order])
    assert torch.equal(sorted_scale, scale)
    assert torch.equal(sorted_signs, signs)

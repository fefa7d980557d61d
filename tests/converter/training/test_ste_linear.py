"""A trainable linear agrees with the reference implementation, and every trained parameter gets a gradient."""

from dataclasses import replace

import pytest
import torch
from bwla_converter.training import levels, ste_linear
from bwla_converter.training.levels import level_unit, sum_of_planes
from bwla_converter.training.ste_linear import (
    LATENT_RANGE,
    InputTransform,
    SignProduct,
    STELinear,
    latent_with_signs,
    sign_product,
    straight_through_codes,
)
from bwla_kernels import reference
from bwla_kernels.format import LayerSpec, pack_signs, unpack_signs, validate_layer
from bwla_kernels.precision import product_dtype
from random_tensors import random_layer
from torch import Tensor

SPEC = LayerSpec(24, 64, 2, 4, 8, rank=3)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture
def stored() -> dict[str, Tensor]:
    return random_layer(SPEC, seed=3)


@pytest.mark.parametrize("bits", [2, 6, 8, 16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_forward_agrees_with_the_reference(
    generator: torch.Generator, bits: int, trained: bool, planes: int
) -> None:
    spec = replace(SPEC, bits=bits, planes=planes)
    stored = random_layer(spec, seed=3)
    bias = torch.randn(24, generator=generator)
    latent = torch.randn(24, 64, generator=generator) if trained else None
    linear = STELinear(InputTransform(stored, spec), stored, spec, bias, latent)
    x = torch.randn(2, 5, 64, generator=generator)
    x[0, 0] = 0.0
    expected = reference.linear(x, {**stored, "bias": bias}, replace(spec, bias=True))
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
    linear.input_transform.clear_cache()
    training = linear(x)
    error = (training.detach() - expected).norm() / expected.norm()
    assert float(error) < 4 * torch.finfo(product_dtype(x.device)).eps


def test_what_is_stored_is_what_was_given(stored: dict[str, Tensor], generator: torch.Generator) -> None:
    for latent in (None, torch.randn(24, 64, generator=generator)):
        linear = STELinear(InputTransform(stored, SPEC), stored, SPEC, latent=latent)
        tensors = {**stored, **linear.stored()}
        validate_layer("layer", tensors, SPEC)
        assert torch.equal(tensors["weight_packed"], stored["weight_packed"])
        for key in ("weight_scale", "column_scale", "low_rank_a", "low_rank_b"):
            torch.testing.assert_close(tensors[key], stored[key])


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_what_is_stored_of_several_planes_has_descending_scales(
    generator: torch.Generator, planes: int
) -> None:
    spec = replace(SPEC, planes=planes)
    stored = random_layer(spec, seed=3)  # its scales are in no order
    scale = stored["weight_scale"].float()
    expected = sum_of_planes(unpack_signs(stored["weight_packed"]), scale)
    for latent in (None, torch.randn(24, 64, generator=generator)):
        linear = STELinear(InputTransform(stored, spec), stored, spec, latent=latent)
        tensors = {**stored, **linear.stored()}
        validate_layer("layer", tensors, spec)
        assert torch.equal(tensors["weight_scale"], stored["weight_scale"].sort(1, descending=True).values)
        weights = sum_of_planes(unpack_signs(tensors["weight_packed"]), tensors["weight_scale"].float())
        torch.testing.assert_close(weights, expected)
        again = STELinear(InputTransform(tensors, spec), tensors, spec).stored()
        assert all(torch.equal(tensor, again[key]) for key, tensor in linear.stored().items())


@pytest.mark.parametrize("planes", [1, 3])
def test_every_parameter_gets_a_gradient(generator: torch.Generator, planes: int) -> None:
    spec = replace(SPEC, planes=planes)
    stored = random_layer(spec, seed=3)
    input_transform = InputTransform(stored, spec)
    linear = STELinear(input_transform, stored, spec, latent=torch.randn(24, 64, generator=generator))
    linear(torch.randn(7, 64, generator=generator)).square().mean().backward()
    grads = {name: parameter.grad for name, parameter in linear.named_parameters()}
    assert set(grads) == {
        "latent",
        "log_scale",
        "low_rank_b",
        "input_transform.log_column_scale",
        "input_transform.low_rank_a",
    }
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads.values())


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_scales_have_the_true_gradient(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, planes: int
) -> None:
    """Without rounding of activations, everything but the signs is smooth: compare with finite differences."""
    spec = replace(SPEC, bits=16, planes=planes)
    stored = random_layer(spec, seed=3)
    for module in (ste_linear, levels):
        monkeypatch.setattr(module, "product_dtype", lambda device: torch.float32)
    linear = STELinear(InputTransform(stored, spec), stored, spec)
    x = torch.randn(4, 64, generator=generator)

    def loss() -> Tensor:
        linear.input_transform.clear_cache()
        return linear(x).square().mean()

    loss().backward()
    for parameter in (linear.log_scale, linear.input_transform.log_column_scale):
        direction = torch.randn(parameter.shape, generator=generator)
        assert parameter.grad is not None
        slope = float((parameter.grad * direction).sum())
        with torch.no_grad():
            parameter += 1e-3 * direction
            up = float(loss())
            parameter -= 2e-3 * direction
            down = float(loss())
            parameter += 1e-3 * direction
        assert (up - down) / 2e-3 == pytest.approx(slope, rel=2e-2)


def test_frozen_signs_are_a_linear_map(generator: torch.Generator) -> None:
    signs = torch.randint(0, 2, (6, 8), generator=generator).to(torch.int8) * 2 - 1
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: SignProduct.apply(t, signs, torch.float64), (x,))
    torch.testing.assert_close(SignProduct.apply(x, signs, torch.float64), x @ signs.double().mT)


@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 64)])
def test_products_that_are_trained_have_the_gradients_of_a_matrix_product(
    generator: torch.Generator, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=generator, requires_grad=True)
    latent = torch.randn(24, 64, generator=generator, requires_grad=True)
    output_gradient = torch.randn(*shape[:-1], 24, generator=generator)
    (sign_product(x, latent) * output_gradient).sum().backward()
    signs = torch.where(latent.detach() >= 0, 1.0, -1.0)
    expected_x = output_gradient @ signs
    expected_latent = output_gradient.flatten(0, -2).mT @ x.detach().flatten(0, -2)
    bound = 4 * torch.finfo(product_dtype(x.device)).eps
    for gradient, expected in ((x.grad, expected_x), (latent.grad, expected_latent)):
        assert gradient is not None
        assert gradient.dtype == torch.float32
        outside = (latent.detach().abs() > LATENT_RANGE) if gradient is latent.grad else torch.zeros(1)
        difference = torch.where(outside.bool(), 0.0, gradient - expected)
        assert float(difference.norm() / expected.norm()) < bound


def test_latents_are_not_pushed_out_of_their_range() -> None:
    latent = torch.tensor([3.0, 3.0, -3.0, -3.0, 1.0], requires_grad=True)
    product = SignProduct.apply(torch.ones(1, 1), latent.unsqueeze(1), torch.float32)
    (product * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])).sum().backward()
    # A step is opposite to the gradient, so it leads outwards where gradient and latent differ in sign.
    assert latent.grad is not None
    assert latent.grad.tolist() == [1.0, 0.0, 0.0, -1.0, 1.0]


def test_latents_start_with_the_given_signs(generator: torch.Generator) -> None:
    latent = 3.0 * torch.randn(10, 32, generator=generator)
    signs = torch.randint(0, 2, (10, 32), generator=generator).to(torch.int8) * 2 - 1
    start = latent_with_signs(latent, signs)
    assert torch.equal(start.sign(), signs.float())
    assert float(start.abs().max()) <= LATENT_RANGE
    agree = (latent.sign() == signs) & (latent.abs() > 0.1) & (latent.abs() < LATENT_RANGE)
    assert torch.equal(start[agree], latent[agree])
    assert torch.equal(unpack_signs(pack_signs(start.sign().to(torch.int8))), signs)


def test_a_weight_as_latent_is_the_weight_in_other_units(
    stored: dict[str, Tensor], generator: torch.Generator
) -> None:
    linear = STELinear(InputTransform(stored, SPEC), stored, SPEC)
    weight = torch.randn(24, 64, generator=generator)
    latent = linear.original_latent(weight)
    basis = stored["rotation_left"].float(), stored["rotation_right"].float()
    columns = stored["column_scale"].float()
    # x W^T = (x_hat * columns) (latent * scales)^T + x (B A)^T, with x_hat the rotated x.
    x = torch.randn(5, 64, generator=generator)
    x_hat = reference.rotate(x, *basis) * columns
    outputs = x_hat @ (latent * stored["weight_scale"].float().unsqueeze(1)).mT
    outputs += x @ (stored["low_rank_b"].float() @ stored["low_rank_a"].float()).mT
    torch.testing.assert_close(
        outputs, x @ weight.mT, rtol=1e-2, atol=1e-1
    )  # rotations are stored in 16 bits


def test_a_weight_as_latent_is_in_units_of_the_first_scale(generator: torch.Generator) -> None:
    spec = replace(SPEC, planes=2)
    stored = random_layer(spec, seed=3)
    one = {
        **stored,
        "weight_scale": stored["weight_scale"][:, 0],
        "weight_packed": stored["weight_packed"][:, 0],
    }
    weight = torch.randn(24, 64, generator=generator)
    latent = STELinear(InputTransform(stored, spec), stored, spec).original_latent(weight)
    assert torch.equal(latent, STELinear(InputTransform(one, SPEC), one, SPEC).original_latent(weight))


def test_levels_that_are_unfrozen_and_frozen_again_are_the_same(generator: torch.Generator) -> None:
    spec = replace(SPEC, planes=3)
    stored = random_layer(spec, seed=3)
    linear = STELinear(InputTransform(stored, spec), stored, spec)
    signs, scale = linear.signs, stored["weight_scale"].float()
    assert signs is not None
    assert signs.shape == (24, 3, 64)
    wanted = sum_of_planes(signs, scale)
    linear.unfreeze_signs(wanted / scale[:, :1])
    assert linear.latent is not None
    torch.testing.assert_close(linear.latent * level_unit(scale), wanted, rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        linear.latent[0, 0] *= -1.0
    frozen = linear.freeze_signs()
    assert linear.latent is None
    assert frozen.dtype == torch.int8
    assert (frozen != signs).any(1).nonzero().tolist() == [[0, 0]]
    assert torch.equal(frozen[0, :, 0], -signs[0, :, 0])


def test_signs_that_are_unfrozen_and_frozen_again_are_the_same(
    stored: dict[str, Tensor], generator: torch.Generator
) -> None:
    linear = STELinear(InputTransform(stored, SPEC), stored, SPEC)
    signs = linear.signs
    assert signs is not None
    linear.unfreeze_signs(torch.randn(24, 64, generator=generator))
    assert linear.signs is None
    assert {name for name, _ in linear.named_parameters()} >= {"latent"}
    assert linear.latent is not None
    with torch.no_grad():
        linear.latent[0, 0] *= -1.0
    frozen = linear.freeze_signs()
    assert linear.latent is None
    assert frozen.dtype == torch.int8
    assert (frozen != signs).nonzero().tolist() == [[0, 0]]
    assert torch.equal(unpack_signs(linear.stored()["weight_packed"]), frozen)


def test_codes_of_zeros_are_zeros() -> None:
    x_hat = torch.zeros(2, 64, requires_grad=True)
    out = straight_through_codes(x_hat, SPEC)
    out.sum().backward()
    assert torch.equal(out.detach(), torch.zeros(2, 64))
    assert torch.equal(x_hat.grad, torch.ones(2, 64))


def test_linears_of_a_group_share_the_transformed_input(stored: dict[str, Tensor]) -> None:
    input_transform = InputTransform(stored, SPEC)
    x = torch.ones(1, 64)
    first = input_transform(x)
    assert input_transform(x) is first
    assert input_transform(x.clone()) is not first
    input_transform.clear_cache()
    assert input_transform(x) is not first

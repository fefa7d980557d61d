"""Recipe `fast` on one group: valid, deterministic, and closer to the original's outputs than `data-free`."""

from dataclasses import replace

import pytest
import torch
from bwla_converter.quantize import data_free, fast
from bwla_converter.quantize.fast import FastOptions, corrected_target
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments, rotate_hessian
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec, validate_layer
from bwla_kernels.reference import dequantize, rotate
from torch import Tensor

QUICK = FastOptions(okt_rounds=4, rounds=2, sweeps=1)
SPECS = {"q": LayerSpec(48, 64, 1, 8, 8, rank=2), "k": LayerSpec(24, 64, 1, 8, 8, rank=2)}


def inputs(seed: int = 0, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return correlated inputs, and the same with noise, as in a quantized model."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=generator) * torch.logspace(0, -1, 64)
    x = torch.randn(600, 64, generator=generator) @ mix.mT
    return x, x + noise * x.std() * torch.randn(600, 64, generator=generator)


def moments_of(x: Tensor, x_hat: Tensor) -> Moments:
    moments = Moments.zeros(64, torch.device("cpu"), cross_gram=True)
    for batch_hat, batch in zip(x_hat.split(100), x.split(100), strict=True):
        moments.add(batch_hat, batch)
    return moments


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(spec.out_features, 64, generator=generator) for name, spec in SPECS.items()}


def output_error(weights: dict[str, Tensor], result: GroupResult, x: Tensor, x_hat: Tensor) -> float:
    squared_error = sum(
        (x @ weight.mT - x_hat @ dequantize(result.tensors[name], SPECS[name]).mT).square().sum()
        for name, weight in weights.items()
    )
    squared_norm = sum((x @ weight.mT).square().sum() for weight in weights.values())
    return float((squared_error / squared_norm).sqrt())


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_valid_and_better_than_data_free(weights: dict[str, Tensor], noise: float) -> None:
    x, x_hat = inputs(noise=noise)
    result = fast.quantize_group(weights, SPECS, moments_of(x, x_hat), options=QUICK)
    for name, tensors in result.tensors.items():
        validate_layer(name, tensors, SPECS[name])
        assert all(
            torch.equal(tensors[key], result.tensors["q"][key]) for key in ("rotation_left", "low_rank_a")
        )
    few = data_free.DataFreeOptions(okt_rounds=4, psp_rounds=4)
    by_weights = data_free.quantize_group(weights, SPECS, options=few)
    assert output_error(weights, result, x, x_hat) < 0.8 * output_error(weights, by_weights, x, x_hat)
    assert result.traces["output"][-1] <= result.traces["output"][0]


def test_the_reported_error_is_that_of_the_stored_tensors(weights: dict[str, Tensor]) -> None:
    x, _ = inputs()
    options = FastOptions(okt_rounds=2, rounds=1, sweeps=1, damping=1e-6, target_damping=float("inf"))
    result = fast.quantize_group(weights, SPECS, moments_of(x, x), options=options)
    assert result.traces["output"] == [pytest.approx(output_error(weights, result, x, x), rel=1e-3)]


def test_same_seed_same_bytes_and_inputs_unchanged(weights: dict[str, Tensor]) -> None:
    x, x_hat = inputs(noise=0.1)
    moments, copies = moments_of(x, x_hat), {name: weight.clone() for name, weight in weights.items()}
    gram = moments.gram.clone()
    first, again = (fast.quantize_group(weights, SPECS, moments, seed=1, options=QUICK) for _ in range(2))
    other = fast.quantize_group(weights, SPECS, moments, seed=2, options=QUICK)
    for name, tensors in first.tensors.items():
        assert all(torch.equal(tensor, again.tensors[name][key]) for key, tensor in tensors.items())
        assert not torch.equal(tensors["rotation_left"], other.tensors[name]["rotation_left"])
        assert torch.equal(weights[name], copies[name])
    assert torch.equal(moments.gram, gram)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(64 * 500, 0.02), (64 * 50, 0.02), (64 * 5, 0.2), (64 // 2, 2.0)]
)
def test_dampings_grow_as_the_sampling_error_where_tokens_are_few(tokens: int, expected: float) -> None:
    moments = Moments.zeros(64, torch.device("cpu"), cross_gram=False)
    moments.count = tokens
    assert FastOptions().damped(0.02, moments) == pytest.approx(expected)
    assert FastOptions().damped(float("inf"), moments) == float("inf")


def test_the_target_is_the_least_squares_fit(weights: dict[str, Tensor]) -> None:
    x, x_hat = inputs(noise=0.5)
    weight = weights["q"]
    target = corrected_target(weight, moments_of(x, x_hat), 1e-6)
    expected = torch.linalg.lstsq(x_hat.double(), (x @ weight.mT).double()).solution.mT.float()
    torch.testing.assert_close(target, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(corrected_target(weight, moments_of(x, x_hat), float("inf")), weight)
    same = corrected_target(weight, moments_of(x, x), 0.1)
    torch.testing.assert_close(same, weight, rtol=1e-3, atol=1e-3)


def test_the_target_compensates_the_error_of_the_residual_stream(weights: dict[str, Tensor]) -> None:
    x, x_hat = inputs(noise=0.5)
    generator = torch.Generator().manual_seed(2)
    stream, mix = torch.randn(600, 48, generator=generator), torch.randn(64, 48, generator=generator)
    stream_hat = stream - 0.1 * x_hat @ mix  # an error that the inputs predict
    error = (x - x_hat) @ weights["q"].mT + stream - stream_hat
    moments = Moments.zeros(64, torch.device("cpu"), cross_gram=False)
    for batch_hat, batch_error in zip(x_hat.split(100), error.split(100), strict=True):
        moments.add(batch_hat)
        moments.add_error(batch_hat, batch_error)
    target = corrected_target(weights["q"], moments, 1e-6)
    outputs = (x @ weights["q"].mT + stream - stream_hat).double()
    expected = torch.linalg.lstsq(x_hat.double(), outputs).solution.mT.float()
    torch.testing.assert_close(target, expected, rtol=1e-2, atol=1e-2)


def test_the_clip_is_chosen_by_the_inputs(weights: dict[str, Tensor]) -> None:
    x, _ = inputs()
    specs = {name: replace(spec, bits=3) for name, spec in SPECS.items()}
    moments = moments_of(x, x)
    chosen = fast.quantize_group(weights, specs, moments, inputs=x[:200], options=QUICK)
    assert chosen.clip is not None
    assert 0 < chosen.clip < 1
    left = fast.quantize_group(
        weights, specs, moments, inputs=x[:200], options=replace(QUICK, choose_clip=False)
    )
    assert left.clip is None


def test_the_rotated_hessian_measures_the_same_error() -> None:
    x, _ = inputs()
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(1, 8, 8, generator=generator)).Q for _ in range(2))
    moments = moments_of(x, x)
    rows = torch.randn(3, 64, generator=generator)
    plain = ((rows @ moments.gram) * rows).sum(1)
    turned = rotate(rows, left, right)
    torch.testing.assert_close(
        ((turned @ rotate_hessian(moments.gram, left, right)) * turned).sum(1), plain, rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_inputs_without_information_are_refused(weights: dict[str, Tensor], value: float) -> None:
    x = torch.full((10, 64), value)
    with pytest.raises(SourceError, match="calibration: expected finite, nonzero inputs"):
        fast.quantize_group(weights, SPECS, moments_of(x, x), options=QUICK)

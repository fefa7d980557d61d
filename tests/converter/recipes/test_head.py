"""The head in binary planes: chunks of rows that share an input transform."""

import pytest
import torch
from bwla_converter.quantize import experts
from bwla_converter.quantize.moments import Moments
from bwla_converter.recipes.head import quantize_head
from bwla_kernels.format import LayerSpec, tensor_specs
from bwla_kernels.reference import dequantize, linear

ROWS, WIDTH = 100, 64


@pytest.fixture
def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(256, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)


@pytest.fixture
def moments(inputs: torch.Tensor) -> Moments:
    made = Moments.zeros(WIDTH, torch.device("cpu"), cross_gram=False)
    made.add(inputs)
    return made


def spec_of(planes: int, rank: int = 2) -> LayerSpec:
    return LayerSpec(ROWS, WIDTH, 1, 8, 8, rank=rank, bits=16, planes=planes)


@pytest.mark.parametrize("rank", [0, 2])
def test_chunks_of_rows_make_one_linear(
    rank: int, moments: Moments, inputs: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "CHUNK_ROWS", 32)
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    spec = spec_of(3, rank)
    result = quantize_head(weight, spec, moments)
    tensors = result.tensors["lm_head"]
    wanted = {key: (value.shape, value.dtypes[0]) for key, value in tensor_specs(spec).items()}
    assert {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()} == wanted
    expected = inputs @ weight.mT
    found = linear(inputs, tensors, spec)
    error = ((found - expected).square().sum(0) / expected.square().sum(0)).sqrt()
    assert error.max() < 0.25
    torch.testing.assert_close(found, inputs @ dequantize(tensors, spec).mT, rtol=1e-3, atol=1e-2)


def test_more_planes_are_closer(moments: Moments) -> None:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    two, three, four = (
        quantize_head(weight, spec_of(planes), moments).errors["lm_head"] for planes in (2, 3, 4)
    )
    assert four < 0.7 * three < 0.5 * two


def test_the_same_seed_gives_the_same_bytes(moments: Moments) -> None:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    first, again = (quantize_head(weight, spec_of(2), moments, seed=3).tensors["lm_head"] for _ in range(2))
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())

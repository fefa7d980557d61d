"""The ops that the library registers itself: what torch hands over arrives, and is given back."""

from collections.abc import Callable

import pytest
import torch
from bwla_kernels.cpu import linear as kernel
from bwla_kernels.cpu.backend import CpuBackend
from bwla_kernels.cpu.head import CpuHead, head
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.head import quantize_head
from torch import Tensor

SPEC = LayerSpec(70, 192, 2, 8, 12, rank=3, bits=5, clip=0.9, bias=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def layer(make_layer) -> dict[str, Tensor]:
    return CpuBackend().prepare(make_layer(SPEC, 1), SPEC)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 400, generator=torch.Generator().manual_seed(2))


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[:, :192].contiguous(),
    lambda x: x[:, 5:197],
    lambda x: x[::2, :192],
    lambda x: x[:1, 1:193],
    lambda x: x[0, :192],
    lambda x: x[:0, :192],
    lambda x: x[:, :384].reshape(6, 192, 2)[:, :, 0],
    lambda x: x[:, :384].reshape(2, 3, 2, 192).transpose(0, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_linear_equals_the_direct_call(layer: dict[str, Tensor], x: Tensor, view, dtype: torch.dtype) -> None:
    x = view(x.to(dtype))
    for bias in (layer["bias"], layer["bias"].bfloat16(), None):
        tensors = {"packed": layer["packed"]} if bias is None else {"packed": layer["packed"], "bias": bias}
        y = CpuBackend().apply(x, tensors, SPEC)
        assert y.is_contiguous()
        assert torch.equal(y, kernel.linear(x.contiguous(), layer["packed"], SPEC, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_head_equals_the_direct_call(x: Tensor, view, dtype: torch.dtype) -> None:
    spec, x = HeadSpec(50, 192), view(x.to(dtype))
    stored = quantize_head(torch.randn(50, 192, generator=torch.Generator().manual_seed(3)))
    tensors = CpuHead().prepare(stored, spec)
    y = CpuHead().apply(x, tensors, spec)
    assert y.is_contiguous()
    assert torch.equal(y, head(x.contiguous(), **tensors))


def test_tensors_are_given_back(layer: dict[str, Tensor], x: Tensor) -> None:
    x = x[:, :192].contiguous()
    held = [*layer.values(), x]
    before = [tensor._use_count() for tensor in held]
    y = CpuBackend().apply(x, layer, SPEC)
    assert y._use_count() == 1
    with pytest.raises(RuntimeError):
        CpuBackend().apply(x[:, :32], layer, SPEC)
    assert [tensor._use_count() for tensor in held] == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(2, 64)}, "x of the layer's input width"),
        ({"x": torch.zeros(2, 192, dtype=torch.float64)}, "x in bfloat16, float16 or float32"),
        ({"packed": torch.zeros(64, dtype=torch.uint8)}, "packed weights of this layer"),
        ({"bias": torch.zeros(7)}, "a contiguous bias of the layer's output width"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(layer: dict[str, Tensor], change: dict, sentence: str) -> None:
    given = {"x": torch.zeros(2, 192), **layer, **change}
    with pytest.raises(RuntimeError, match=sentence):
        CpuBackend().apply(given.pop("x"), given, SPEC)


def test_a_head_that_does_not_fit_is_refused() -> None:
    stored = CpuHead().prepare(quantize_head(torch.ones(8, 64)), HeadSpec(8, 64))
    with pytest.raises(RuntimeError, match="weight_scale float32"):
        CpuHead().apply(torch.zeros(1, 64), {**stored, "weight_scale": torch.ones(3)}, HeadSpec(8, 64))
    with pytest.raises(RuntimeError, match="x of the layer's input width"):
        CpuHead().apply(torch.zeros(1, 32), stored, HeadSpec(8, 64))

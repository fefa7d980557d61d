"""Matrix products in reduced precision: where they are used, how exact they are, and that nothing stays switched."""

from collections.abc import Iterator

import pytest
import torch
from bwla_kernels.precision import fast_products, has_fast_bfloat16

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cleared() -> Iterator[None]:
    has_fast_bfloat16.cache_clear()
    yield
    has_fast_bfloat16.cache_clear()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)],
)
def test_a_cpu_needs_instructions_for_bfloat16(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_fast_bfloat16(CPU) is (fast and torch.backends.mkldnn.is_available())
    assert not has_fast_bfloat16(torch.device("meta"))


def test_products_of_bfloat16_values_are_summed_in_float32() -> None:
    a, b = normal(64, 96).bfloat16().float(), normal(96, 32).bfloat16().float()
    with fast_products(CPU):
        product = a @ b
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_operands_are_rounded_at_most_to_bfloat16() -> None:
    a, b = normal(64, 96), normal(96, 32)
    with fast_products(CPU):
        product = a @ b
    error = product.double() - a.double() @ b.double()
    assert float(error.norm() / product.double().norm()) < 2**-8


def test_without_the_instructions_products_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    a, b = normal(64, 96), normal(96, 32)
    with fast_products(CPU):
        product = a @ b
    assert torch.equal(product, a @ b)


def test_the_setting_is_restored_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), fast_products(CPU):
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before

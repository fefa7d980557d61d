"""Products of the sign search are exact where the error is computed, and close where it is not."""

import pytest
import torch
from bwla_kernels.sign_search import products


def test_products_with_signs_keep_nearly_all_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(70, 96, generator=generator)
    signs = torch.randint(0, 2, (33, 96), generator=generator) * 2.0 - 1.0
    expected = (matrix.double() @ signs.double().mT).float()
    monkeypatch.setattr(products, "PRODUCT_ROWS", 32)
    for fast in (False, True):
        monkeypatch.setattr(products, "has_fast_bfloat16", lambda _, fast=fast: fast)
        found = products.sign_product(matrix, signs)
        assert float((found - expected).abs().max()) < 2.0**-15 * 96**0.5
    rounded = products.rounded_product(matrix, signs)
    assert float((rounded - expected).abs().max()) < 2.0**-7 * 96**0.5

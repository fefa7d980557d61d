"""Full precision for exact comparisons, whatever the processor; tests of reduced precision are in common/."""

from collections.abc import Iterator

import pytest
import torch
from bwla_kernels.precision import has_fast_bfloat16


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    has_fast_bfloat16.cache_clear()
    yield
    has_fast_bfloat16.cache_clear()

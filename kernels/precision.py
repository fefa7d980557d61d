"""Matrix products of float32 tensors in reduced precision, where that is several times faster."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch


@cache
def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether products in bfloat16 are several times faster than in float32: a GPU, or AVX-512 or AMX for it."""
    if device.type == "cuda":
        return True
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the operands of matrix products: bfloat16 where that is much faster, else float32."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which matrix products keep their precision, also where the caller uses `torch.autocast`.

    Autocast also reaches into ops that are written in torch. There it would round rotations to bfloat16, which changes
    activation codes.
    """
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Round the operands of float32 matrix products on `device`, where that is fast; sums and results stay float32.

    A CPU rounds to bfloat16, a GPU to TF32. Everything but matrix products, attention among it, is computed as usual.
    Weights that are stored in bfloat16 lose nothing, and activations as much as in a model that is served in bfloat16.
    """
    if not has_fast_bfloat16(device):
        yield
        return
    backends: Any = torch.backends  # its submodules set their attributes at run time
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if device.type == "cuda" else "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before

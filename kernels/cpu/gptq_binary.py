"""The compiled kernel of one-bit GPTQ, as the op `bwla::gptq_binarize_cpu` (`gptq_binary` has the reference)."""

from collections.abc import Sequence
from ctypes import c_float

import torch
from bwla_kernels.cpu.library import Isa, available, load
from bwla_kernels.cpu.linear import STATUS, expect
from bwla_kernels.errors import BackendError
from torch import Tensor

COLUMN_STEP = 32
"""K must be a multiple of this, as in the checkpoint format: a strip has up to 16 whole columns."""

MOST_SCALES = 8
"""Initial scales that the kernel can try."""

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LIBRARY.define(
    "gptq_binarize_cpu(Tensor weight, Tensor weight_hessian, Tensor hessian, Tensor? factor, float[] scale_factors, "
    "int sweeps, bool refine_all) -> (Tensor, Tensor, Tensor)"
)


def gptq_binarize(
    weight: Tensor,
    weight_hessian: Tensor,
    hessian: Tensor,
    factor: Tensor | None,
    scale_factors: Sequence[float],
    sweeps: int,
    refine_all: bool,
    isa: Isa | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Binarize the rows of a weight.

    Args:
        weight: W, contiguous float32 [N, K] on the CPU, K a multiple of 32.
        weight_hessian: W H, contiguous float32 [N, K].
        hessian: H, symmetric, contiguous float32 [K, K].
        factor: upper Cholesky factor of H's inverse, contiguous float32 [K, K]; None starts from the signs of W.
        scale_factors: initial scales in units of each row's mean magnitude, at most 8.
        sweeps: sweeps of coordinate descent.
        refine_all: run coordinate descent from every initial scale instead of the best one of each row.
        isa: variant of the kernel; by default the loaded one.
        threads: threads to use; by default torch's number. Rows are independent: results do not depend on it.

    Returns: signs float32 [N, K], scales float32 [N], errors (w - a s) H (w - a s)^T float32 [N].

    Raises:
        BackendError: a tensor has another shape, dtype or layout.
    """
    n, k = weight.shape
    if k % COLUMN_STEP or not 1 <= len(scale_factors) <= MOST_SCALES:
        raise BackendError(
            f"gptq_binarize: expected a multiple of {COLUMN_STEP} columns and 1 to {MOST_SCALES} initial scales, "
            f"found {k} and {len(scale_factors)}"
        )
    expect("weight", weight, torch.float32, (n, k))
    expect("weight_hessian", weight_hessian, torch.float32, (n, k))
    expect("hessian", hessian, torch.float32, (k, k))
    if factor is not None:
        expect("factor", factor, torch.float32, (k, k))
    mean = weight.abs().mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    sign, scale, error = torch.empty_like(weight), torch.empty_like(mean), torch.empty_like(mean)
    library = load()
    status = library.handle.bwla_gptq_binarize(
        library.isa if isa is None else isa,
        weight.data_ptr(), weight_hessian.data_ptr(), hessian.data_ptr(),
        None if factor is None else factor.data_ptr(), mean.data_ptr(),
        (c_float * len(scale_factors))(*scale_factors), len(scale_factors), sweeps, int(refine_all), n, k,
        sign.data_ptr(), scale.data_ptr(), error.data_ptr(),
        torch.get_num_threads() if threads is None else threads,
    )  # fmt: skip
    if status:
        raise BackendError(f"the CPU kernel refused to binarize {n} x {k}: {STATUS.get(status, status)}")
    return sign, scale, error


def _fake(weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = weight.new_empty(len(weight))
    return torch.empty_like(weight), rows, torch.empty_like(rows)


_LIBRARY.impl("gptq_binarize_cpu", gptq_binarize, "CPU")
torch.library.register_fake("bwla::gptq_binarize_cpu", _fake, lib=_LIBRARY)


def can_binarize(weight: Tensor) -> tuple[bool, str]:
    """Return whether the compiled kernel can binarize `weight`, and the reason if not."""
    if not weight.is_cpu:
        return False, f"the compiled kernel runs on the CPU, not on {weight.device}"
    if weight.shape[1] % COLUMN_STEP:
        return False, f"{weight.shape[1]} columns are not a multiple of {COLUMN_STEP}"
    return available()

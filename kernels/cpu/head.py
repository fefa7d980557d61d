"""The CPU backend of the 8-bit head: the compiled kernel behind `ops.HeadBackend`, as a torch.library op."""

from collections.abc import Mapping

import torch
from bwla_kernels import gradients
from bwla_kernels.cpu.library import Isa, available, load
from bwla_kernels.cpu.linear import DTYPES, STATUS, empty_huge, expect
from bwla_kernels.errors import BackendError
from bwla_kernels.format.head import HeadSpec
from torch import Tensor

MAX_COLUMNS = 65536
"""Columns up to which the 32-bit sums of one plane of codes are exact."""

ROWS_AT_ONCE = 8192
"""Rows that are summed at a time: torch converts them to int32 first."""

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LAYER = "Tensor weight_int8, Tensor weight_scale, Tensor row_sum"
_LIBRARY.define(f"head_cpu(Tensor x, {_LAYER}) -> Tensor")


def head(
    x: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    row_sum: Tensor,
    isa: Isa | None = None,
    threads: int | None = None,
) -> Tensor:
    """Compute the logits of x [..., K]: [..., V] in the dtype of x.

    Args:
        x: bfloat16, float16 or float32; rows may be strided.
        weight_int8: int8 [V, K].
        weight_scale: float32 [V].
        row_sum: int32 [V], the sum of each row of `weight_int8`.
        isa: variant; by default the loaded one.
        threads: maximum number of threads, by default torch's; negative: exactly that number, however small the work.

    Raises:
        BackendError: a tensor does not fit.
    """
    library = load()
    n, k = weight_int8.shape
    dtype = DTYPES.get(x.dtype)
    if dtype is None or x.shape[-1] != k or not x.is_cpu:
        raise BackendError(
            f"x: expected bfloat16, float16 or float32 [..., {k}] on the CPU, "
            f"found {x.dtype} {list(x.shape)} on {x.device}"
        )
    expect("weight_int8", weight_int8, torch.int8, (n, k))
    expect("weight_scale", weight_scale, torch.float32, (n,))
    expect("row_sum", row_sum, torch.int32, (n,))
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty(*x.shape[:-1], n)
    status = library.handle.bwla_head(
        library.isa if isa is None else isa,
        weight_int8.data_ptr(), weight_scale.data_ptr(), row_sum.data_ptr(), n, k,
        rows.data_ptr(), rows.shape[0], rows.stride(0), dtype, out.data_ptr(),
        torch.get_num_threads() if threads is None else threads,
    )  # fmt: skip
    if status:
        raise BackendError(f"the CPU kernel refused a head of {n} x {k}: {STATUS.get(status, status)}")
    return out


def _head_fake(x: Tensor, weight_int8: Tensor, weight_scale: Tensor, row_sum: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_int8.shape[0])


torch.library.register_fake("bwla::head_cpu", _head_fake, lib=_LIBRARY)
gradients.register_input_gradient(
    _LIBRARY, "head_cpu", _LAYER, gradients.head_input_gradient, lambda weight, *_: weight.shape[1]
)
_HEAD = torch.ops.bwla.head_cpu.default


class CpuHead:
    """Compute the head with the compiled kernel on the CPU."""

    name = "cpu"

    def can_implement(self, spec: HeadSpec, device: torch.device) -> tuple[bool, str]:
        """Return whether the kernel was built and covers the head, and the reason."""
        if device.type != "cpu":
            return False, f"the compiled kernel runs on the CPU, not on {device}"
        if spec.in_features > MAX_COLUMNS:
            return False, f"sums over {spec.in_features} columns do not fit 32 bits"
        return available()

    def prepare(self, tensors: Mapping[str, Tensor], spec: HeadSpec) -> dict[str, Tensor]:
        """Return the stored tensors, with the codes on huge pages, and `row_sum`."""
        stored = tensors["weight_int8"]
        codes = empty_huge(stored.numel()).view(torch.int8).view(stored.shape).copy_(stored)
        row_sum = torch.cat([part.sum(1, dtype=torch.int32) for part in codes.split(ROWS_AT_ONCE)])
        return {"weight_int8": codes, "weight_scale": tensors["weight_scale"], "row_sum": row_sum}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: HeadSpec) -> Tensor:
        """Compute x [..., K] -> [..., V] in the dtype of x."""
        y: Tensor = _HEAD(x, tensors["weight_int8"], tensors["weight_scale"], tensors["row_sum"])
        return y

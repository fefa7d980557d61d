"""Checks of the tensors that compiled kernels read through their addresses."""

from collections.abc import Mapping

import torch
from bwla_kernels.errors import BackendError
from torch import Tensor


def expect(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise BackendError unless a tensor is contiguous and has the dtype, the shape and the device."""
    if (
        tensor.dtype != dtype
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or tensor.device != device
    ):
        raise BackendError(
            f"{name}: expected contiguous {dtype} {list(shape)} on {device}, found {tensor.dtype} "
            f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
        )


MATRICES, SUMS = ("factor", "hessian"), ("scale", "dots", "norms")
"""Arguments of the steps of the sign search with shapes [B, B] and [C, N]."""


def expect_sign_step(
    tensors: Mapping[str, Tensor], device: torch.device, planes: bool = False
) -> tuple[int, int, int]:
    """Check the arguments of a step of the sign search by name, all float32 on `device` (see `sign_search.steps`).

    Args:
        tensors: the arguments.
        device: where they must be.
        planes: whether it is a step of `sign_search.levels`: planes take the place of the candidates.

    Returns: B columns, C candidates and N rows.

    Raises:
        BackendError: a tensor has another shape, dtype, layout or device.
    """
    target, scale = tensors["target"], tensors["scale"]
    if target.dim() != 2 or scale.dim() != 2:
        raise BackendError(
            f"target and scale: expected [B, N] and [C, N], found {list(target.shape)} and {list(scale.shape)}"
        )
    (columns, rows), candidates = target.shape, len(scale)
    shapes = {
        "target": (columns, rows),
        "pivots": (columns,),
        **dict.fromkeys(MATRICES, (columns, columns)),
        **dict.fromkeys(SUMS, (candidates, rows)),
        **({"norms": (candidates, candidates, rows)} if planes else {}),
    }
    for name, tensor in tensors.items():
        expect(name, tensor, torch.float32, shapes.get(name, (columns, candidates, rows)), device)
    return columns, candidates, rows

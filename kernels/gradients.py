"""Backward passes of the ops: straight-through gradients with respect to x, for training adapters and attribution.

Each op `bwla::NAME(x, *layer)` gets a companion `bwla::NAME_input_gradient(gradient, *layer)`, which computes the
gradient of `straight_through` from the tensors that the backend has prepared. It dequantizes a slab of rows at a time,
and torch.compile does not see into it, so no dequantized weight is kept between the forward and the backward pass.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from bwla_kernels import reference
from bwla_kernels.errors import BackendError
from bwla_kernels.precision import has_fast_bfloat16, without_autocast
from torch import Tensor

WEIGHTS_AT_ONCE = 1 << 24
"""Weights that a backward pass dequantizes at a time: 64 MiB of float32."""


def row_slabs(rows: int, columns: int, multiple: int = 1) -> list[slice]:
    """Divide the rows of a weight [rows, columns] into slabs of WEIGHTS_AT_ONCE, each but the last a `multiple`."""
    step = max(1, WEIGHTS_AT_ONCE // columns // multiple) * multiple
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def product_of_slabs(gradient: Tensor, slabs: Iterable[Tensor], in_features: int) -> Tensor:
    """Multiply the gradient of an output by a weight of which only a slab of rows exists at a time.

    Args:
        gradient: [M, N], any float dtype.
        slabs: consecutive rows of the weight [N, K], any dtype.
        in_features: K.

    Returns: float32 [M, K]. Where the gradient is bfloat16 and the device multiplies bfloat16 several times faster,
        the operands and the product of each slab are rounded to it.
    """
    fast = gradient.dtype == torch.bfloat16 and has_fast_bfloat16(gradient.device)
    dtype = torch.bfloat16 if fast else torch.float32
    total = gradient.new_zeros(gradient.shape[0], in_features, dtype=torch.float32)
    start = 0
    for slab in slabs:
        total += gradient[:, start : start + slab.shape[0]].to(dtype) @ slab.to(dtype)
        start += slab.shape[0]
    return total


def linear_input_gradient(
    gradient: Tensor,
    rotated_slabs: Iterable[Tensor],
    rotation_left: Tensor,
    rotation_right: Tensor,
    column_scale: Tensor,
    low_rank_a: Tensor | None,
    low_rank_b: Tensor | None,
) -> Tensor:
    """Return the gradient of a linear's input, in the basis of the input: float32 [M, K].

    Args:
        gradient: of the output, [M, N].
        rotated_slabs: consecutive rows of sum_p alpha_p S_p, float32 [N, K].
        rotation_left, rotation_right, column_scale: as stored, any float dtype.
        low_rank_a, low_rank_b: [r, K] and [N, r], or None.
    """
    rotated = product_of_slabs(gradient, rotated_slabs, column_scale.shape[0])
    result = reference.rotate_back(rotated.mul_(column_scale), rotation_left, rotation_right)
    if low_rank_a is not None and low_rank_b is not None:
        result = result + (gradient.float() @ low_rank_b.float()) @ low_rank_a.float()
    return result


def head_input_gradient(gradient: Tensor, weight_int8: Tensor, weight_scale: Tensor, *_: Tensor) -> Tensor:
    """Return the gradient of an 8-bit head's input, float32 [M, K], from that of the logits [M, V]."""
    rows, columns = weight_int8.shape
    slabs = (weight_int8[part] * weight_scale[part].unsqueeze(1) for part in row_slabs(rows, columns))
    return product_of_slabs(gradient, slabs, columns)


def register_input_gradient(
    library: torch.library.Library,
    name: str,
    layer: str,
    compute: Callable[..., Tensor],
    in_features: Callable[..., int],
) -> None:
    """Register the backward pass of the op `bwla::NAME(x, *layer)`.

    Args:
        library: the library that defines the op.
        name: NAME.
        layer: schema of the op's arguments after x.
        compute: function of `(gradient [M, N], *layer)` that returns float32 [M, K].
        in_features: function of `layer` that returns K.
    """
    companion = f"{name}_input_gradient"

    def run(gradient: Tensor, *arguments: Any) -> Tensor:
        rows = gradient.reshape(-1, gradient.shape[-1])
        with without_autocast(gradient.device):
            result = compute(rows, *arguments).to(gradient.dtype)
        return result.reshape(*gradient.shape[:-1], in_features(*arguments))

    def fake(gradient: Tensor, *arguments: Any) -> Tensor:
        return gradient.new_empty(*gradient.shape[:-1], in_features(*arguments))

    library.define(f"{companion}(Tensor gradient, {layer}) -> Tensor")
    library.impl(companion, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bwla::{companion}", fake, lib=library)
    op = getattr(torch.ops.bwla, companion).default

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if any(ctx.needs_input_grad[1:]):
            raise BackendError(
                f"bwla::{name}: expected requires_grad for the input only, found it for a weight, a scale or the bias; "
                "they are constants of a quantized layer: train an adapter beside the layer instead"
            )
        return op(gradient, *_restore(ctx)), *[None] * len(ctx.arguments)

    torch.library.register_autograd(f"bwla::{name}", backward, setup_context=_keep, lib=library)
    refuse_gradient(library, companion, "only first derivatives are implemented: do not set create_graph")


def refuse_gradient(library: torch.library.Library, name: str, reason: str) -> None:
    """Let a backward pass through the op `bwla::NAME` raise BackendError; torch would warn and drop the gradient."""

    def backward(ctx: Any, *_: Tensor) -> None:
        raise BackendError(f"bwla::{name} has no gradient: {reason}")

    torch.library.register_autograd(f"bwla::{name}", backward, lib=library)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep an op's arguments after x for the backward pass, without copies."""
    arguments = inputs[1:]
    ctx.save_for_backward(*(value for value in arguments if isinstance(value, Tensor)))
    ctx.arguments = [None if isinstance(value, Tensor) else value for value in arguments]
    ctx.is_tensor = [isinstance(value, Tensor) for value in arguments]


def _restore(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    return [
        next(saved) if tensor else value for tensor, value in zip(ctx.is_tensor, ctx.arguments, strict=True)
    ]

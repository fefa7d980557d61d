"""A quantized linear that gradients flow through: straight-through signs and codes, everything else as it is.

The forward pass computes what `bwla_kernels.reference` defines, in float32. Backwards, rounding of activations and
the sign of a weight count as the identity (straight-through estimator, arXiv 1308.3432), the latter only within
LATENT_RANGE. Scales are trained as logarithms, so they stay positive.
"""

from collections.abc import Iterable, Mapping

import torch
from bwla_converter.shell import Block
from bwla_kernels.format import LayerSpec, pack_signs, unpack_signs
from bwla_kernels.format.layer import UNQUANTIZED_BITS
from bwla_kernels.reference import rotate
from torch import Tensor, nn

LATENT_RANGE = 2.0
"""Latent weights, in units of their row's scale, get no gradient that would push them further out than this."""


class InputSide(nn.Module):
    """What the members of an input group share; computed once for one input.

    Args:
        tensors: a member's tensors as the format stores them.
        spec: its layer.
    """

    left: Tensor
    right: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("left", tensors["rotation_left"])
        self.register_buffer("right", tensors["rotation_right"])
        self.log_column = nn.Parameter(tensors["column_scale"].log())
        self.low_rank_a = nn.Parameter(tensors["low_rank_a"].float()) if spec.rank else None
        self._last: tuple[Tensor, tuple[Tensor, Tensor | None]] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [..., K] -> what the codes stand for [..., K], and u [..., r] (None at rank 0)."""
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        x_hat = rotate(x, self.left, self.right) * self.log_column.exp()
        u = x.float() @ self.low_rank_a.mT if self.low_rank_a is not None else None
        result = (straight_through_codes(x_hat, self.spec), u)
        self._last = (x, result)
        return result

    def forget(self) -> None:
        """Let go of the last input and its graph."""
        self._last = None


def straight_through_codes(x_hat: Tensor, spec: LayerSpec) -> Tensor:
    """x_hat [..., K] rounded as `reference.quantize` does, with the gradient of the identity."""
    if spec.bits == UNQUANTIZED_BITS:
        return x_hat
    q_max = (1 << (spec.bits - 1)) - 1
    cells = x_hat.detach().unflatten(-1, (spec.blocks, -1))
    scale = (cells.abs().amax(-1, keepdim=True) * (spec.clip / q_max)).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    rounded = torch.round(cells / scale).clamp(-q_max, q_max) * scale
    result: Tensor = x_hat + (rounded.flatten(-2) - x_hat).detach()
    return result


class SignOf(torch.autograd.Function):
    """Sign of latent weights (0 counts as +1); the gradient passes where it does not push out of LATENT_RANGE."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, latent: Tensor) -> Tensor:
        ctx.save_for_backward(latent)
        return torch.where(latent >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (latent,) = ctx.saved_tensors  # type: ignore[attr-defined]
        outwards = (latent.abs() > LATENT_RANGE) & (gradient * latent < 0)
        return gradient.masked_fill(outwards, 0.0)


class FixedSigns(torch.autograd.Function):
    """x S^T for signs kept as int8 [N, K]: nothing of their float copy stays for the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, signs: Tensor) -> Tensor:
        ctx.save_for_backward(signs)
        return x @ signs.to(x.dtype).mT

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient @ signs.to(gradient.dtype), None


def _apply(function: type[torch.autograd.Function], *arguments: Tensor | None) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


class TunableLinear(nn.Module):
    """One member of an input group.

    Args:
        side: its group's input side.
        tensors: its tensors as the format stores them.
        spec: the layer.
        bias: [N], not trained.
        latent: float32 [N, K], what the signs are the signs of, in units of the row's scale; None fixes the signs.
    """

    signs: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        side: InputSide,
        tensors: Mapping[str, Tensor],
        spec: LayerSpec,
        bias: Tensor | None = None,
        latent: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.side, self.spec = side, spec
        signs = unpack_signs(tensors["weight_packed"])
        self.latent = nn.Parameter(agreeing(latent, signs)) if latent is not None else None
        self.register_buffer("signs", None if latent is not None else signs)
        self.register_buffer("bias", bias)
        self.log_scale = nn.Parameter(tensors["weight_scale"].log())
        self.low_rank_b = nn.Parameter(tensors["low_rank_b"].float()) if spec.rank else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        x_hat, u = self.side(x)
        sums = (
            x_hat @ _apply(SignOf, self.latent).mT
            if self.latent is not None
            else _apply(FixedSigns, x_hat, self.signs)
        )
        y: Tensor = sums * self.log_scale.exp()
        if u is not None and self.low_rank_b is not None:
            y = y + u @ self.low_rank_b.mT
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """What tuning may have changed, as the format stores it, without names' prefix."""
        found = {"weight_scale": self.log_scale.exp(), "column_scale": self.side.log_column.exp()}
        if self.latent is not None:
            found["weight_packed"] = pack_signs(torch.where(self.latent >= 0, 1, -1).to(torch.int8))
        if self.low_rank_b is not None and self.side.low_rank_a is not None:
            found["low_rank_a"] = self.side.low_rank_a.bfloat16()
            found["low_rank_b"] = self.low_rank_b.bfloat16()
        return {key: value.clone() for key, value in found.items()}


SMALLEST_LATENT = 0.05
"""Where error feedback chose the sign that the weight itself does not have, the latent starts just past zero."""


def agreeing(latent: Tensor, signs: Tensor) -> Tensor:
    """`latent` with the signs that were chosen: its magnitude where it agrees, a small one where it does not."""
    here = latent * signs
    return torch.where(here > SMALLEST_LATENT, here, SMALLEST_LATENT).clamp_max(LATENT_RANGE) * signs


def tunable_group(
    block: Block,
    tensors: Mapping[str, Mapping[str, Tensor]],
    specs: Mapping[str, LayerSpec],
    latents: Mapping[str, Tensor],
) -> dict[str, TunableLinear]:
    """Put tunable linears in the places of an input group's; biases stay as they are.

    Args:
        block: the block, changed in place.
        tensors, specs: of the group's members, by name.
        latents: of those whose signs may move.
    """
    first = next(iter(tensors))
    side = InputSide(tensors[first], specs[first])
    members = {}
    for name, stored in tensors.items():
        bias = getattr(block.linear(name), "bias", None)
        members[name] = TunableLinear(side, stored, specs[name], bias, latents.get(name))
        block.replace(name, members[name])
    return members


def norm_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a module's norms by their names in it."""
    return {name: value for name, value in module.named_parameters() if name.endswith("norm.weight")}


def forget_inputs(linears: Iterable[TunableLinear]) -> None:
    """Let go of the inputs that groups keep for their members."""
    for linear in linears:
        linear.side.forget()

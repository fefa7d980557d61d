"""A quantized linear that gradients flow through: straight-through signs and codes, everything else as it is.

The forward pass computes what `bwla_kernels.reference` defines, in float32 (in training, products with signs are in
bfloat16 where that is fast). Backwards, rounding of activations and the sign of a weight count as the identity
(straight-through estimator, arXiv 1308.3432), the latter only within LATENT_RANGE. Scales are trained as logarithms,
so they stay positive.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from bwla_converter.calibration.layer_runner import DecoderLayer
from bwla_kernels.format import LayerSpec, pack_signs, unpack_signs
from bwla_kernels.format.layer import SCALE_DTYPE, UNQUANTIZED_BITS, to_compute_dtype
from bwla_kernels.reference import rotate
from torch import Tensor, nn

LATENT_RANGE = 2.0
"""Latent weights, in units of their row's scale, get no gradient that would push them further out than this."""


class InputTransform(nn.Module):
    """What the members of an input group share; computed once for one input.

    Args:
        tensors: a member's tensors as the format stores them.
        spec: its layer.
    """

    left: Tensor
    right: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> None:
        super().__init__()
        self.spec, tensors = spec, to_compute_dtype(tensors)
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
    cells = x_hat.detach().unflatten(-1, (spec.rotation_groups, -1))
    scale = (cells.abs().amax(-1, keepdim=True) * (spec.clip / q_max)).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    rounded = torch.round(cells / scale).clamp(-q_max, q_max) * scale
    result: Tensor = x_hat + (rounded.flatten(-2) - x_hat).detach()
    return result


@cache  # asked for every product
def product_dtype(device: torch.device) -> torch.dtype:
    """What products with signs are computed in while training: bfloat16 where the processor multiplies it natively.

    Signs are exact in it, and codes of up to 8 bits but for their scale; it is about four times as fast as float32.
    """
    native = device.type == "cuda"
    if device.type == "cpu":
        found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


class SignProduct(torch.autograd.Function):
    """x S^T, where S is the sign (0 counts as +1) of int8 signs or of latent weights [N, K].

    A latent weight gets the sign's gradient, unless that would push it further out of LATENT_RANGE. Neither the
    float copy of S nor, for fixed signs, x stays for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, source: Tensor, dtype: torch.dtype
    ) -> Tensor:
        rows = x.flatten(0, -2).to(dtype)
        ctx.save_for_backward(source, rows if source.is_floating_point() else source)
        ctx.dtype, ctx.shape = dtype, x.shape[:-1]  # type: ignore[attr-defined]
        result: Tensor = (rows @ _signs(source, dtype).mT).to(x.dtype).unflatten(0, x.shape[:-1])
        return result

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        source, rows = ctx.saved_tensors  # type: ignore[attr-defined]
        above = gradient.flatten(0, -2).to(ctx.dtype)  # type: ignore[attr-defined]
        inputs = above @ _signs(source, ctx.dtype)  # type: ignore[attr-defined]
        of_x = inputs.to(gradient.dtype).unflatten(0, ctx.shape)  # type: ignore[attr-defined]
        if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            return of_x, None, None
        of_latent = (above.mT @ rows).to(source.dtype)
        free = (source.abs() <= LATENT_RANGE).logical_or_(of_latent * source >= 0)
        return of_x, of_latent.mul_(free.view(torch.int8)), None


def _signs(source: Tensor, dtype: torch.dtype) -> Tensor:
    if source.is_floating_point():
        # By way of bytes: on a CPU torch converts booleans, and chooses between numbers, an element at a time.
        source = (source >= 0).view(torch.int8).mul(2).sub_(1)
    return source.to(dtype)


def sign_product(x: Tensor, source: Tensor) -> Tensor:
    """x [..., K] times the signs of `source` [N, K]: [..., N]; in the dtype of x where no gradient is recorded."""
    dtype = product_dtype(x.device) if torch.is_grad_enabled() else x.dtype
    function: Any = SignProduct.apply  # untyped in torch
    result: Tensor = function(x, source, dtype)
    return result


class STELinear(nn.Module):
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
        side: InputTransform,
        tensors: Mapping[str, Tensor],
        spec: LayerSpec,
        bias: Tensor | None = None,
        latent: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.side, self.spec = side, spec
        self.register_buffer("signs", unpack_signs(tensors["weight_packed"]))
        self.latent: nn.Parameter | None = None
        if latent is not None:
            self.free_signs(latent)
        self.register_buffer("bias", bias)
        self.log_scale = nn.Parameter(tensors["weight_scale"].float().log())
        self.low_rank_b = nn.Parameter(tensors["low_rank_b"].float()) if spec.rank else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        x_hat, u = self.side(x)
        y: Tensor = sign_product(x_hat, self._source) * self.log_scale.exp()
        if u is not None and self.low_rank_b is not None:
            y = y + u @ self.low_rank_b.mT
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)

    @property
    def _source(self) -> Tensor:
        """What the signs are the signs of: latent weights, or the signs themselves where they are fixed."""
        source = self.signs if self.latent is None else self.latent
        assert source is not None
        return source

    def free_signs(self, latent: Tensor) -> None:
        """From now on the signs, which were fixed, follow a latent weight [N, K] in units of the row's scale."""
        assert self.signs is not None
        self.latent, self.signs = nn.Parameter(agreeing(latent, self.signs)), None

    @torch.no_grad()
    def fix_signs(self) -> Tensor:
        """From now on the signs stay as they are, int8 [N, K]; the latent weight is let go."""
        assert self.latent is not None
        signs = _signs(self.latent, torch.int8)
        self.latent, self.signs = None, signs
        return signs

    @torch.no_grad()
    def original_latent(self, weight: Tensor) -> Tensor:
        """A weight [N, K] as `free_signs` takes it: rotated, without the low-rank part, in units of the scales."""
        column = self.side.log_column.exp()
        rotated = rotate(weight.float(), self.side.left, self.side.right) / column
        if self.low_rank_b is not None and self.side.low_rank_a is not None:
            low_rank_a = rotate(self.side.low_rank_a, self.side.left, self.side.right) / column
            rotated -= self.low_rank_b @ low_rank_a
        return rotated / self.log_scale.exp().unsqueeze(1)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """What tuning may have changed, as the format stores it, without names' prefix."""
        found = {
            "weight_packed": pack_signs(_signs(self._source, torch.int8)),
            "weight_scale": self.log_scale.exp().to(SCALE_DTYPE),
            "column_scale": self.side.log_column.exp().to(SCALE_DTYPE),
        }
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


def ste_group(
    block: DecoderLayer,
    tensors: Mapping[str, Mapping[str, Tensor]],
    specs: Mapping[str, LayerSpec],
    latents: Mapping[str, Tensor],
) -> dict[str, STELinear]:
    """Put tunable linears in the places of an input group's; biases stay as they are.

    Args:
        block: the block, changed in place.
        tensors, specs: of the group's members, by name.
        latents: of those whose signs may move.
    """
    first = next(iter(tensors))
    side = InputTransform(tensors[first], specs[first])
    members = {}
    for name, stored in tensors.items():
        bias = getattr(block.linear(name), "bias", None)
        members[name] = STELinear(side, stored, specs[name], bias, latents.get(name))
        block.replace(name, members[name])
    return members


def norm_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a module's norms by their names in it."""
    return {name: value for name, value in module.named_parameters() if name.endswith("norm.weight")}


def forget_inputs(linears: Iterable[STELinear]) -> None:
    """Let go of the inputs that groups keep for their members."""
    for linear in linears:
        linear.side.forget()

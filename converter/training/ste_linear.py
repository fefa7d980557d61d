"""A quantized linear that can be trained, by straight-through estimators of the signs and of the activation codes.

The forward pass agrees with `bwla_kernels.reference` in float32 (while training, products with signs are computed in
bfloat16 where that is fast). In the backward pass, the rounding of activations and the sign of a weight count as the
identity (straight-through estimator, arXiv 1308.3432), the latter only within LATENT_RANGE. Scales are trained as
logarithms, so that they stay positive. `levels` has what differs for several planes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from bwla_converter.calibration.layer_runner import DecoderLayer
from bwla_converter.training.levels import (
    Levels,
    in_descending_order,
    level_unit,
    planes_product,
    sum_of_planes,
)
from bwla_kernels.format import LayerSpec, pack_signs, unpack_signs
from bwla_kernels.format.layer import SCALE_DTYPE, UNQUANTIZED_BITS, to_compute_dtype
from bwla_kernels.precision import product_dtype
from bwla_kernels.reference import rotate
from torch import Tensor, nn

LATENT_RANGE = 2.0
"""Latent weights, in units of their row's scale, get no gradient that would push them beyond this magnitude."""

MIN_LATENT = 0.05
"""Initial magnitude of a latent weight where the quantizer chose the sign that the weight itself does not have."""


class InputTransform(nn.Module):
    """Input transform that the linears of an input group share; its result for the last input is cached.

    Args:
        tensors: stored tensors of one of the linears.
        spec: its spec.
    """

    left: Tensor
    right: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> None:
        super().__init__()
        self.spec, tensors = spec, to_compute_dtype(tensors)
        self.register_buffer("left", tensors["rotation_left"])
        self.register_buffer("right", tensors["rotation_right"])
        self.log_column_scale = nn.Parameter(tensors["column_scale"].log())
        self.low_rank_a = nn.Parameter(tensors["low_rank_a"].float()) if spec.rank else None
        self._cache: tuple[Tensor, tuple[Tensor, Tensor | None]] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the dequantized codes of x [..., K] and x A^T [..., r] (None at rank 0)."""
        if self._cache is not None and self._cache[0] is x:
            return self._cache[1]
        x_hat = rotate(x, self.left, self.right) * self.log_column_scale.exp()
        u = x.float() @ self.low_rank_a.mT if self.low_rank_a is not None else None
        result = (straight_through_codes(x_hat, self.spec), u)
        self._cache = (x, result)
        return result

    def clear_cache(self) -> None:
        """Release the last input and its autograd graph."""
        self._cache = None


def straight_through_codes(x_hat: Tensor, spec: LayerSpec) -> Tensor:
    """Round x_hat [..., K] as `reference.quantize` does, with the gradient of the identity."""
    if spec.bits == UNQUANTIZED_BITS:
        return x_hat
    q_max = (1 << (spec.bits - 1)) - 1
    groups = x_hat.detach().unflatten(-1, (spec.rotation_groups, -1))
    scale = (groups.abs().amax(-1, keepdim=True) * (spec.clip / q_max)).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    rounded = torch.round(groups / scale).clamp(-q_max, q_max) * scale
    result: Tensor = x_hat + (rounded.flatten(-2) - x_hat).detach()
    return result


class SignProduct(torch.autograd.Function):
    """Compute x S^T, where S [N, K] are the signs (0 counts as +1) of int8 signs or of float latent weights.

    Products run in `dtype`: signs are exact in bfloat16, and so are codes of up to 8 bits apart from their scale.
    A latent weight gets the sign's gradient, unless a step would push it further out of LATENT_RANGE. To save memory,
    the backward pass keeps neither the float copy of S nor, for fixed signs, x.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        rows = x.flatten(0, -2).to(dtype)
        ctx.save_for_backward(weights, rows if weights.is_floating_point() else weights)
        ctx.dtype, ctx.shape = dtype, x.shape[:-1]  # type: ignore[attr-defined]
        result: Tensor = (rows @ _signs(weights, dtype).mT).to(x.dtype).unflatten(0, x.shape[:-1])
        return result

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        weights, rows = ctx.saved_tensors  # type: ignore[attr-defined]
        output_gradient = gradient.flatten(0, -2).to(ctx.dtype)  # type: ignore[attr-defined]
        of_rows = output_gradient @ _signs(weights, ctx.dtype)  # type: ignore[attr-defined]
        of_x = of_rows.to(gradient.dtype).unflatten(0, ctx.shape)  # type: ignore[attr-defined]
        if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            return of_x, None, None
        of_latent = (output_gradient.mT @ rows).to(weights.dtype)
        kept = (weights.abs() <= LATENT_RANGE).logical_or_(of_latent * weights >= 0)
        return of_x, of_latent.mul_(kept.view(torch.int8)), None


def _signs(weights: Tensor, dtype: torch.dtype) -> Tensor:
    if weights.is_floating_point():
        # Through int8: on a CPU, torch.where and the conversion of booleans are not vectorized.
        weights = (weights >= 0).view(torch.int8).mul(2).sub_(1)
    return weights.to(dtype)


def sign_product(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply x [..., K] by the signs of `weights` [N, K]: [..., N], in x's dtype where no gradient is recorded."""
    dtype = product_dtype(x.device) if torch.is_grad_enabled() else x.dtype
    function: Any = SignProduct.apply  # untyped in torch
    result: Tensor = function(x, weights, dtype)
    return result


class STELinear(nn.Module):
    """A trainable quantized linear.

    Args:
        input_transform: the input transform, shared with the other linears of the input group.
        tensors: the linear's stored tensors.
        spec: its spec.
        bias: [N], not trained.
        latent: float32 [N, K]. Latent weights (straight-through) divided by the row scale (that of the first plane);
            None freezes the signs.
    """

    signs: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        input_transform: InputTransform,
        tensors: Mapping[str, Tensor],
        spec: LayerSpec,
        bias: Tensor | None = None,
        latent: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.input_transform, self.spec = input_transform, spec
        self.register_buffer("signs", unpack_signs(tensors["weight_packed"]))
        self.log_scale = nn.Parameter(tensors["weight_scale"].float().log())
        self.latent: nn.Parameter | None = None
        if latent is not None:
            self.unfreeze_signs(latent)
        self.register_buffer("bias", bias)
        self.low_rank_b = nn.Parameter(tensors["low_rank_b"].float()) if spec.rank else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [..., N] for x [..., K], in the dtype of x."""
        x_hat, u = self.input_transform(x)
        scale = self.log_scale.exp()
        y: Tensor
        if self.spec.planes == 1:
            y = sign_product(x_hat, self._sign_weights) * scale
        else:
            y = planes_product(x_hat, self._sign_weights, scale)
        if u is not None and self.low_rank_b is not None:
            y = y + u @ self.low_rank_b.mT
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)

    @property
    def _sign_weights(self) -> Tensor:
        """The tensor whose signs are used: the latent weights, or the signs themselves where they are frozen."""
        weights = self.signs if self.latent is None else self.latent
        assert weights is not None
        return weights

    def unfreeze_signs(self, latent: Tensor) -> None:
        """Train the signs through latent weights, initialized from `latent` [N, K] in units of the first scale."""
        assert self.signs is not None
        if self.spec.planes == 1:
            start = latent_with_signs(latent, self.signs)
        else:
            scale = self.log_scale.detach().exp()
            weights = sum_of_planes(self.signs, scale)
            start = Levels.of(scale).move_inside(latent * (scale[:, :1] / level_unit(scale)), weights)
        self.latent, self.signs = nn.Parameter(start), None

    @torch.no_grad()
    def freeze_signs(self) -> Tensor:
        """Keep the current signs, release the latent weights, and return the signs, int8 [N, K] or [N, P, K]."""
        assert self.latent is not None
        self.signs = self._current_signs()
        self.latent = None
        return self.signs

    def _current_signs(self) -> Tensor:
        """Return the signs, int8 [N, K], those of several planes [N, P, K]."""
        if self.latent is not None and self.spec.planes > 1:
            return Levels.of(self.log_scale.exp()).plane_signs(self.latent)
        return _signs(self._sign_weights, torch.int8)

    @torch.no_grad()
    def original_latent(self, weight: Tensor) -> Tensor:
        """Turn an original weight [N, K] into latent weights: rotate, subtract the low-rank part, divide by scales."""
        column = self.input_transform.log_column_scale.exp()
        rotated = rotate(weight.float(), self.input_transform.left, self.input_transform.right) / column
        if self.low_rank_b is not None and self.input_transform.low_rank_a is not None:
            low_rank_a = (
                rotate(self.input_transform.low_rank_a, self.input_transform.left, self.input_transform.right)
                / column
            )
            rotated -= self.low_rank_b @ low_rank_a
        return rotated / self.log_scale.exp().view(len(rotated), -1)[:, :1]

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """Return the trained tensors as the format stores them, by their names inside the linear."""
        signs, scale = self._current_signs(), self.log_scale.exp()
        if self.spec.planes > 1:
            signs, scale = in_descending_order(signs, scale)
        tensors = {
            "weight_packed": pack_signs(signs),
            "weight_scale": scale.to(SCALE_DTYPE),
            "column_scale": self.input_transform.log_column_scale.exp().to(SCALE_DTYPE),
        }
        if self.low_rank_b is not None and self.input_transform.low_rank_a is not None:
            tensors["low_rank_a"] = self.input_transform.low_rank_a.bfloat16()
            tensors["low_rank_b"] = self.low_rank_b.bfloat16()
        return {key: value.clone() for key, value in tensors.items()}


def latent_with_signs(latent: Tensor, signs: Tensor) -> Tensor:
    """Return `latent` with the given signs, its magnitude replaced by MIN_LATENT where it had the other sign."""
    magnitude = latent * signs
    return torch.where(magnitude > MIN_LATENT, magnitude, MIN_LATENT).clamp_max(LATENT_RANGE) * signs


def ste_group(
    layer: DecoderLayer,
    tensors: Mapping[str, Mapping[str, Tensor]],
    specs: Mapping[str, LayerSpec],
    latents: Mapping[str, Tensor],
) -> dict[str, STELinear]:
    """Replace the linears of an input group by trainable ones; their biases are kept.

    Args:
        layer: the decoder layer, changed in place.
        tensors, specs: stored tensors and specs of the group's linears, by name.
        latents: latent weights of those whose signs are trained.

    Returns: the trainable linears by name.
    """
    first = next(iter(tensors))
    input_transform = InputTransform(tensors[first], specs[first])
    linears = {}
    for name, stored in tensors.items():
        bias = getattr(layer.linear(name), "bias", None)
        linears[name] = STELinear(input_transform, stored, specs[name], bias, latents.get(name))
        layer.replace(name, linears[name])
    return linears


def norm_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of the norms in a module, by their names inside it."""
    return {name: value for name, value in module.named_parameters() if name.endswith("norm.weight")}


def clear_input_caches(linears: Iterable[STELinear]) -> None:
    """Release the inputs that the linears' input transforms have cached."""
    for linear in linears:
        linear.input_transform.clear_cache()

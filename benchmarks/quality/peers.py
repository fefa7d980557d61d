"""Other ways to one bit, on the same inputs and in the same loop as ours: what recipe `fast` is compared with.

Each is written from its publication; bits are what the published storage needs, all of it counted.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_converter.common.bits import bits_per_weight
from bwla_converter.quantize.gptq_binary import INITIAL_SCALE_FACTORS, gptq_binarize, inverse_cholesky
from bwla_converter.quantize.group import GroupResult, check_group, pool_rows, store_group
from bwla_converter.quantize.moments import Moments, rotate_hessian
from bwla_converter.recipes.fast import FastRecipe
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import UNQUANTIZED_BITS
from bwla_kernels.reference import quantize, rotate
from torch import Tensor, nn

DAMPING = 0.01
SCALE_BITS = 16
REFIT_ROWS = 64
GROUP = 128
"""Columns that share BiLLM's scales, and columns that its error feedback handles at once."""


class FakeLinear(nn.Module):
    """A dense weight that stands for a quantized one, with activations quantized per token.

    Args:
        weight: float32 [N, K].
        bias: [N].
        bits: of the activations, 2..8 or 16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if self.bits != UNQUANTIZED_BITS:
            codes, scale = quantize(flat, 1, self.bits, 1.0)
            flat = codes.float() * scale
        return nn.functional.linear(flat, self.weight, self.bias).to(x.dtype).reshape(*x.shape[:-1], -1)


def identity(side: LayerSpec) -> tuple[Tensor, Tensor]:
    """No rotation, in the format's factors."""
    return (
        torch.eye(side.n1).repeat(side.rotation_groups, 1, 1),
        torch.eye(side.n2).repeat(side.rotation_groups, 1, 1),
    )


def hadamard(order: int) -> Tensor:
    """Sylvester's orthogonal Hadamard matrix; `order` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    if len(matrix) != order:
        raise ValueError(f"a Sylvester matrix of order {order}: expected a power of two")
    return matrix / order**0.5


def random_hadamard(blocks: int, order: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix a block, its rows' signs random [G, order, order] (QuaRot, arXiv 2404.00456)."""
    signs = torch.randint(0, 2, (blocks, order, 1), generator=generator) * 2.0 - 1.0
    return signs * hadamard(order)


class PeerRecipe(FastRecipe):
    """A peer that fits our format: its group goes into the blocks as `fast`'s does."""

    def bits(self, spec: LayerSpec) -> float:
        """Bits a weight: the sign, and a 16-bit scale a row."""
        return 1.0 + 16.0 / spec.in_features

    def fitted_norm(self) -> dict[str, Tensor]:
        """Peers leave norms as they are."""
        return {}


class RoundToNearest(PeerRecipe):
    """sign(W) and mean|W| of each row (BWN, arXiv 1603.05279)."""

    def group(
        self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        """From the weights alone."""
        side = check_group(weights, {}, specs)
        rows = pool_rows(weights.values())
        return stored(weights, specs, identity(side), rows, rows.abs().mean(1))


class Gptq(PeerRecipe):
    """GPTQ (arXiv 2210.17323) with a one-bit code: per row the best of four starting scales, then refitted."""

    def rotation(self, side: LayerSpec) -> tuple[Tensor, Tensor]:
        """None."""
        return identity(side)

    def group(
        self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        """Error feedback in the metric of the inputs, without coordinate descent."""
        side = check_group(weights, {}, specs)
        basis = self.rotation(side)
        hessian = rotate_hessian(moments.hessian(DAMPING), *basis)
        code = gptq_binarize(rotate(pool_rows(weights.values()), *basis), hessian, inverse_cholesky(hessian), 0)
        return stored(weights, specs, basis, code.sign, code.scale)


class DensePeer(PeerRecipe, ABC):
    """A peer that our format cannot hold: dense weights stand for what it stores, and its bits are counted."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.true_bits: dict[str, float] = {}

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Dense stand-ins in the places of the group's linears."""
        first = next(iter(specs))
        moments, _ = self._moments(first, specs[first].in_features)
        hessian = moments.hessian(DAMPING)
        factor = inverse_cholesky(hessian)
        _, quantized = self.blocks
        for name, weight in weights.items():
            part = self.binarize(weight.float(), hessian, factor, specs)
            self.true_bits[name] = part.bits
            bias = getattr(quantized.linear(name), "bias", None)
            quantized.replace(name, FakeLinear(part.values, bias, specs[name].bits))
        return GroupResult({}, {})

    @abstractmethod
    def binarize(
        self, weight: Tensor, hessian: Tensor, factor: Tensor, specs: Mapping[str, LayerSpec]
    ) -> "Binarized":
        """One member [N, K] of the group that `specs` describes, by its inputs' H and the `inverse_cholesky` of H."""


@dataclass(frozen=True)
class Binarized:
    """A weight as a peer stores it: dense values, and bits for each of them."""

    values: Tensor
    bits: float


class GroupedGptq(DensePeer):
    """GPTQ with as many bits as ours: a 16-bit scale for every so many columns of each row spends what our format
    spends on rotations, scales and the low-rank part of the same layers."""

    def binarize(
        self, weight: Tensor, hessian: Tensor, factor: Tensor, specs: Mapping[str, LayerSpec]
    ) -> Binarized:
        """Groups as wide as the bits of the whole input group allow."""
        columns = weight.shape[1]
        width = round(SCALE_BITS / (bits_per_weight(specs.values()) - 1.0))
        bits = 1.0 + SCALE_BITS * -(-columns // width) / columns
        return Binarized(grouped_one_bit(weight, hessian, factor, width), bits)


def grouped_one_bit(weight: Tensor, hessian: Tensor, factor: Tensor, width: int) -> Tensor:
    """GPTQ with one bit and a scale for each `width` columns of a row; all of a row's scales are refitted at the end.

    Args:
        weight: float32 [N, K].
        hessian: H [K, K].
        factor: its `inverse_cholesky`.
        width: columns of a group. A group starts from several multiples of the mean magnitude that feedback has left
            there; each row keeps what ends best.

    Returns: the weight that is stored [N, K], float32.
    """
    tried = torch.stack(
        [
            refit_groups(weight, grouped_signs(weight, factor, width, start), hessian, width)
            for start in INITIAL_SCALE_FACTORS
        ]
    )
    best = torch.stack([row_errors(found, weight, hessian) for found in tried]).argmin(0)
    return tried[best, torch.arange(len(weight))]


def row_errors(found: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """(found - weight) H (found - weight)^T of each row."""
    lost = found - weight
    return ((lost @ hessian) * lost).sum(1)


def grouped_signs(weight: Tensor, factor: Tensor, width: int, start_factor: float) -> Tensor:
    """Signs by error feedback, where a group's scale is so many times what its mean magnitude is by then."""
    work, sign = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], width):
        own = work[:, start : start + width]
        scale, errors = start_factor * own.abs().mean(1), torch.empty_like(own)
        end = start + own.shape[1]
        for j in range(own.shape[1]):
            column = start + j
            sign[:, column] = sign_of(own[:, j])
            errors[:, j] = (own[:, j] - scale * sign[:, column]) / factor[column, column]
            own[:, j + 1 :].addr_(errors[:, j], factor[column, column + 1 : end], alpha=-1.0)
        work[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1.0)
    return sign


def refit_groups(weight: Tensor, sign: Tensor, hessian: Tensor, width: int) -> Tensor:
    """`sign` times each row's best scales in the metric: all groups of a row at once."""
    group = torch.arange(weight.shape[1]) // width
    member = nn.functional.one_hot(group).float()
    values = []
    for rows, signs in zip(weight.split(REFIT_ROWS), sign.split(REFIT_ROWS), strict=True):
        parts = signs.unsqueeze(1) * member.mT  # [rows, groups, K]: a row's signs, each group's by itself
        products = parts @ hessian
        scales = torch.linalg.solve(products @ parts.mT, products @ rows.unsqueeze(2)).squeeze(2)
        values.append(signs * scales[:, group])
    return torch.cat(values)


class HadamardGptq(Gptq):
    """GPTQ in the basis of a random Hadamard rotation: what QuaRot does before GPTQ."""

    def rotation(self, side: LayerSpec) -> tuple[Tensor, Tensor]:
        """Blocks of the largest power of two that divides the width, at most 128."""
        generator = torch.Generator().manual_seed(self.seed)
        return (
            random_hadamard(side.rotation_groups, side.n1, generator),
            random_hadamard(side.rotation_groups, side.n2, generator),
        )


def hadamard_spec(spec: LayerSpec) -> LayerSpec:
    """`spec` with blocks whose factors are powers of two."""
    from dataclasses import replace

    width = 128
    while spec.in_features % width:
        width //= 2
    n1 = 1 << ((width.bit_length() - 1) // 2)
    return replace(spec, rotation_groups=spec.in_features // width, n1=n1, n2=width // n1)


def stored(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    basis: tuple[Tensor, Tensor],
    sign: Tensor,
    scale: Tensor,
) -> GroupResult:
    """A group in our format, without low-rank part and column scales."""
    shared = {
        "rotation_left": basis[0],
        "rotation_right": basis[1],
        "column_scale": torch.ones(basis[0].shape[0] * basis[0].shape[1] * basis[1].shape[1]),
    }
    empty = sign.new_zeros(len(sign), 0, dtype=torch.bfloat16)
    tensors = store_group(weights, specs, {}, shared, sign, scale.clamp_min(1e-30), empty)
    return GroupResult(tensors, dict.fromkeys(tensors, float("nan")))


class BiLLM(DensePeer):
    """BiLLM (arXiv 2402.04291), written from the paper: salient columns get a second binarization of what is left,
    the rest is split by magnitude into two binarized groups, in blocks of 128 columns with error feedback.

    Its true storage is counted: sign, salient second sign, one bit of group membership a weight, 16-bit scales for
    each row, block and part, one bit a column for salience.
    """

    def binarize(
        self, weight: Tensor, hessian: Tensor, factor: Tensor, specs: Mapping[str, LayerSpec]
    ) -> Binarized:
        """By `billm`."""
        return billm(weight, factor)


def billm(weight: Tensor, factor: Tensor) -> Binarized:
    """BiLLM of one weight [N, K]; `factor` from `inverse_cholesky`."""
    work, out = weight.clone(), torch.empty_like(weight)
    rows, columns = weight.shape
    bits = 0.0
    for start in range(0, columns, GROUP):
        part = slice(start, min(start + GROUP, columns))
        block, local = work[:, part], factor[part, part]
        importance = (block / local.diagonal()).square().sum(0)
        salient = best_salient(block, importance)
        fixed = binarize_block(block, salient)
        # Error feedback as GPTQ does it, with the block's code chosen before.
        errors = torch.empty_like(block)
        own = block.clone()
        for j in range(own.shape[1]):
            errors[:, j] = (own[:, j] - fixed[:, j]) / local[j, j]
            own[:, j + 1 :].addr_(errors[:, j], local[j, j + 1 :], alpha=-1.0)
        out[:, part] = fixed
        work[:, part.stop :].addmm_(errors, factor[part, part.stop :], alpha=-1.0)
        width = block.shape[1]
        # sign + membership of every weight, second sign of salient ones, four 16-bit scales a row, column mask
        bits += rows * (width * 2 + int(salient.sum()) + 4 * 16) + width
    return Binarized(out, bits / weight.numel())


def best_salient(block: Tensor, importance: Tensor) -> Tensor:
    """How many of the most important columns get two signs: the count that leaves the smallest error."""
    order = importance.argsort(descending=True)
    best, error = torch.zeros(block.shape[1], dtype=torch.bool), float("inf")
    for count in (0, 2, 4, 6, 8, 12, 16):
        mask = torch.zeros(block.shape[1], dtype=torch.bool)
        mask[order[:count]] = True
        rest = float((block - binarize_block(block, mask)).square().sum())
        if rest < error:
            best, error = mask, rest
    return best


def binarize_block(block: Tensor, salient: Tensor) -> Tensor:
    """Salient columns by two residual binarizations, the others by two groups split at the best magnitude."""
    out = torch.empty_like(block)
    chosen = block[:, salient]
    first = sign_of(chosen) * mean_of(chosen.abs(), torch.ones_like(chosen, dtype=torch.bool))
    rest = chosen - first
    out[:, salient] = first + sign_of(rest) * mean_of(rest.abs(), torch.ones_like(rest, dtype=torch.bool))
    others = block[:, ~salient]
    magnitude = others.abs()
    best, error = torch.empty_like(others), float("inf")
    for share in torch.linspace(0.1, 0.9, 17).tolist():
        inner = magnitude <= share * magnitude.amax()
        scale = torch.where(inner, mean_of(magnitude, inner), mean_of(magnitude, ~inner))
        lost = float((magnitude - scale).square().sum())
        if lost < error:
            best, error = sign_of(others) * scale, lost
    out[:, ~salient] = best
    return out


def sign_of(values: Tensor) -> Tensor:
    """-1 or +1."""
    return torch.where(values >= 0, 1.0, -1.0)


def mean_of(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked entries of each row [N, 1]; 0 where there are none."""
    return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)

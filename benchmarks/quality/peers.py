"""Other 1-bit methods, in the same calibration loop as recipe `fast`, with which it is compared.

Each is implemented from its publication; its bits are those of the published storage, everything counted.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_converter.calibration.loop import CalibrationLoop
from bwla_converter.common.bits import bits_per_weight
from bwla_converter.options import Calibration
from bwla_converter.quantize.group import GroupResult, check_group, pool_rows, store_group
from bwla_converter.quantize.moments import Moments, rotate_hessian
from bwla_converter.source.model import Source
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import UNQUANTIZED_BITS
from bwla_kernels.reference import quantize, rotate
from bwla_kernels.sign_search import Effort, Metric, Target, gptq_binarize
from torch import Tensor, nn

DAMPING = 0.01
SCALE_BITS = 16
REFIT_ROWS = 64
GROUP = 128
"""Columns that share BiLLM's scales, and block size of its GPTQ updates."""

INITIAL_SCALE_FACTORS = (0.75, 1.0, 1.3, 1.7)
"""Initial scales of GPTQ with 1 bit, in units of the mean magnitude."""


def inverse_cholesky(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of H, float32 [K, K], from which GPTQ propagates errors."""
    lower = torch.linalg.cholesky(hessian.double())
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper.float()


class FakeLinear(nn.Module):
    """A linear with the dequantized weight of another method, and activations quantized per token.

    Args:
        weight: float32 [N, K].
        bias: [N].
        bits: activation bits, 2..8 or 16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., N] for x [..., K]."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if self.bits != UNQUANTIZED_BITS:
            codes, scale = quantize(flat, 1, self.bits, 1.0)
            flat = codes.float() * scale
        return nn.functional.linear(flat, self.weight, self.bias).to(x.dtype).reshape(*x.shape[:-1], -1)


def identity(side: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return the identity as rotation factors."""
    return (
        torch.eye(side.n1).repeat(side.rotation_groups, 1, 1),
        torch.eye(side.n2).repeat(side.rotation_groups, 1, 1),
    )


def hadamard(order: int) -> Tensor:
    """Return Sylvester's orthogonal Hadamard matrix; `order` must be a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    if len(matrix) != order:
        raise ValueError(f"expected a power of two as the order of a Sylvester matrix, found {order}")
    return matrix.div(order**0.5)


def random_hadamard(groups: int, order: int, generator: torch.Generator) -> Tensor:
    """Return a Hadamard matrix with random row signs for each group [G, order, order] (QuaRot, arXiv 2404.00456)."""
    signs = torch.randint(0, 2, (groups, order, 1), generator=generator) * 2.0 - 1.0
    return signs * hadamard(order)


class LoopRecipe(ABC):
    """A method that quantizes one input group after another, in the calibration loop of recipe `fast`."""

    def __init__(self, source: Source, calibration: Calibration, seed: int) -> None:
        self.seed = seed
        self.loop = CalibrationLoop(source, calibration, seed, self.group)

    @abstractmethod
    def group(
        self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        """Quantize an input group, given the moments of its inputs and some of the inputs [M, K]."""

    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Build decoder layer `index` from its stored tensors."""
        self.loop.begin_layer(index, tensors)

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Quantize an input group of the layer."""
        return self.loop.quantize(weights, specs)

    def end_layer(self) -> None:
        """Run the calibration samples through the layer."""
        self.loop.end_layer()

    def fitted_norm(self) -> dict[str, Tensor]:
        """Return nothing: the method changes no norm."""
        return {}


class PeerRecipe(LoopRecipe):
    """A method whose result our format can store."""

    def bits(self, spec: LayerSpec) -> float:
        """Return the bits per weight: the sign, and a 16-bit scale for each row."""
        return 1.0 + 16.0 / spec.in_features


class RoundToNearest(PeerRecipe):
    """BWN (arXiv 1603.05279): sign(W) and mean|W| of each row."""

    def group(
        self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        """Quantize an input group by its weights alone."""
        side = check_group(weights, {}, specs)
        rows = pool_rows(weights.values())
        return stored(weights, specs, identity(side), rows, rows.abs().mean(1))


class Gptq(PeerRecipe):
    """GPTQ (arXiv 2210.17323) with 1 bit: the best of several initial scales for each row, which is then refitted."""

    def rotation(self, side: LayerSpec) -> tuple[Tensor, Tensor]:
        """Return the identity."""
        return identity(side)

    def group(
        self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        """Quantize an input group with GPTQ, without coordinate descent."""
        side = check_group(weights, {}, specs)
        basis = self.rotation(side)
        hessian = rotate_hessian(moments.hessian(DAMPING), *basis)
        metric = Metric.of(hessian)
        target = Target.of(rotate(pool_rows(weights.values()), *basis), metric)
        code = gptq_binarize(target, metric, Effort(INITIAL_SCALE_FACTORS, ()))
        return stored(weights, specs, basis, code.sign, code.scale)


class DensePeer(PeerRecipe, ABC):
    """A method whose result our format cannot store: it is evaluated with dequantized weights, its bits are counted."""

    def __init__(self, source: Source, calibration: Calibration, seed: int) -> None:
        super().__init__(source, calibration, seed)
        self.true_bits: dict[str, float] = {}

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Replace the group's linears by dequantized ones."""
        moments, _ = self.loop.collect_moments(weights)
        hessian = moments.hessian(DAMPING)
        factor = inverse_cholesky(hessian)
        _, quantized = self.loop.layers
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
        """Binarize one linear [N, K] of the group `specs`, given the Hessian H and its `inverse_cholesky`."""


@dataclass(frozen=True)
class Binarized:
    """A binarized weight: its dequantized values, and bits per weight."""

    values: Tensor
    bits: float


class GroupedGptq(DensePeer):
    """GPTQ with as many bits as ours: it spends the bits of our rotations, scales and low-rank correction on 16-bit
    scales for groups of columns."""

    def binarize(
        self, weight: Tensor, hessian: Tensor, factor: Tensor, specs: Mapping[str, LayerSpec]
    ) -> Binarized:
        """Binarize with groups whose width gives the same bits as our format."""
        columns = weight.shape[1]
        width = round(SCALE_BITS / (bits_per_weight(specs) - 1.0))
        bits = 1.0 + SCALE_BITS * -(-columns // width) / columns
        return Binarized(grouped_one_bit(weight, hessian, factor, width), bits)


def grouped_one_bit(weight: Tensor, hessian: Tensor, factor: Tensor, width: int) -> Tensor:
    """Apply GPTQ with 1 bit and a scale for each `width` columns of a row; refit all scales of a row at the end.

    Args:
        weight: float32 [N, K].
        hessian: H [K, K].
        factor: its `inverse_cholesky`.
        width: columns of a group. Each group is tried with several initial scales, as multiples of the mean magnitude
            of its updated weights; each row keeps the best result.

    Returns: the dequantized weight [N, K], float32.
    """
    candidates = torch.stack(
        [
            refit_groups(weight, grouped_signs(weight, factor, width, start), hessian, width)
            for start in INITIAL_SCALE_FACTORS
        ]
    )
    best = torch.stack([row_errors(candidate, weight, hessian) for candidate in candidates]).argmin(0)
    return candidates[best, torch.arange(len(weight))]


def row_errors(dequantized: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """Return E H E^T of each row, where E is the difference of both weights."""
    error = dequantized - weight
    return ((error @ hessian) * error).sum(1)


def grouped_signs(weight: Tensor, factor: Tensor, width: int, start_factor: float) -> Tensor:
    """Choose signs with GPTQ; a group's scale is `start_factor` times the mean magnitude of its updated weights."""
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
    """Return `sign` times the scales that minimize `row_errors`, all groups of a row at once."""
    group = torch.arange(weight.shape[1]) // width
    member = nn.functional.one_hot(group).float()
    values = []
    for rows, signs in zip(weight.split(REFIT_ROWS), sign.split(REFIT_ROWS), strict=True):
        parts = signs.unsqueeze(1) * member.mT  # [rows, groups, K]: the signs of one group each
        products = parts @ hessian
        scales = torch.linalg.solve(products @ parts.mT, products @ rows.unsqueeze(2)).squeeze(2)
        values.append(signs * scales[:, group])
    return torch.cat(values)


class HadamardGptq(Gptq):
    """GPTQ in the basis of a random Hadamard rotation, as QuaRot does it."""

    def rotation(self, side: LayerSpec) -> tuple[Tensor, Tensor]:
        """Return random Hadamard factors."""
        generator = torch.Generator().manual_seed(self.seed)
        return (
            random_hadamard(side.rotation_groups, side.n1, generator),
            random_hadamard(side.rotation_groups, side.n2, generator),
        )


def hadamard_spec(spec: LayerSpec) -> LayerSpec:
    """Return `spec` with rotation groups of the largest power of two that divides the width, at most 128."""
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
    """Store an input group in our format, without low-rank correction and column scales."""
    shared = {
        "rotation_left": basis[0],
        "rotation_right": basis[1],
        "column_scale": torch.ones(basis[0].shape[0] * basis[0].shape[1] * basis[1].shape[1]),
    }
    empty = sign.new_zeros(len(sign), 0, dtype=torch.bfloat16)
    tensors = store_group(weights, specs, {}, shared, sign, scale.clamp_min(1e-30), empty)
    return GroupResult(tensors, dict.fromkeys(tensors, float("nan")))


class BiLLM(DensePeer):
    """BiLLM (arXiv 2402.04291), implemented from the paper.

    The residual of salient columns is binarized again; the other weights are split by magnitude into two binarized
    groups; blocks of 128 columns follow each other with GPTQ updates. The bits count the sign, the second sign of
    salient columns, one bit of group membership for each weight, 16-bit scales for each row, block and part, and one
    bit for each column's salience.
    """

    def binarize(
        self, weight: Tensor, hessian: Tensor, factor: Tensor, specs: Mapping[str, LayerSpec]
    ) -> Binarized:
        """Binarize with `billm`."""
        return billm(weight, factor)


def billm(weight: Tensor, factor: Tensor) -> Binarized:
    """Apply BiLLM to a weight [N, K]; `factor` is the Hessian's `inverse_cholesky`."""
    work, out = weight.clone(), torch.empty_like(weight)
    rows, columns = weight.shape
    bits = 0.0
    for start in range(0, columns, GROUP):
        part = slice(start, min(start + GROUP, columns))
        block, local = work[:, part], factor[part, part]
        importance = (block / local.diagonal()).square().sum(0)
        salient = best_salient(block, importance)
        fixed = binarize_block(block, salient)
        # GPTQ's update, with the block's binarization already chosen.
        errors = torch.empty_like(block)
        own = block.clone()
        for j in range(own.shape[1]):
            errors[:, j] = (own[:, j] - fixed[:, j]) / local[j, j]
            own[:, j + 1 :].addr_(errors[:, j], local[j, j + 1 :], alpha=-1.0)
        out[:, part] = fixed
        work[:, part.stop :].addmm_(errors, factor[part, part.stop :], alpha=-1.0)
        width = block.shape[1]
        # Sign and membership of each weight, second sign of salient ones, four 16-bit scales per row, column mask.
        bits += rows * (width * 2 + int(salient.sum()) + 4 * 16) + width
    return Binarized(out, bits / weight.numel())


def best_salient(block: Tensor, importance: Tensor) -> Tensor:
    """Return a mask of the most important columns; their number is that with the smallest error."""
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
    """Binarize salient columns twice, and the others in two groups that are split at the best magnitude."""
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
    """Return signs -1 or +1; zero counts as positive."""
    return torch.where(values >= 0, 1.0, -1.0)


def mean_of(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each row's masked entries [N, 1]; 0 for a row without any."""
    return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)

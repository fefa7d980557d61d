"""Recipe `data-free` for one input group: OKT, PSP, signs and scales, from the weights alone.

The steps are those of BWLA (arXiv 2605.00422) that need no calibration data, in its order: rotation, low-rank
correction, row and column scales, signs. Each stored tensor is rounded before the next step uses it: signs and scales
are fitted to the residual of the bfloat16 low-rank factors, and errors are measured on the stored tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_converter.common.tensors import in_one_buffer, split_rows
from bwla_converter.quantize.binarize import fit_scales, unbiased
from bwla_converter.quantize.group import (
    GroupResult,
    check_group,
    group_generator,
    relative_error,
    store_group,
)
from bwla_converter.quantize.low_rank.psp import proximal_low_rank
from bwla_converter.quantize.okt.rotation import Rotation, Start, learn_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.reference import rotate, rotate_back
from torch import Tensor


@dataclass(frozen=True)
class DataFreeOptions:
    """Hyperparameters of the `data-free` recipe.

    Attributes:
        okt_rounds: rounds of OKT, 40 in the paper.
        psp_rounds: rounds of PSP, 20 in the paper.
        scale_rounds: alternations of row and column scales.
        start: initial rotation.
        row_mean: use one rank for the row means of the residual (the paper's row centering). Off by default, because a
            free direction of the low-rank correction removes several times as much error.
        unbiased: rescale the rows so that the binarized weight is an unbiased estimate instead of the least-squares
            one. This increases the weight error and decreases the model's loss, see `binarize`.
    """

    okt_rounds: int = 40
    psp_rounds: int = 20
    scale_rounds: int = 12
    start: Start = "random"
    row_mean: bool = False
    unbiased: bool = True


def quantize_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    *,
    biases: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    options: DataFreeOptions | None = None,
) -> GroupResult:
    """Quantize the linears of one input group.

    Holds two float32 copies of the group's weights in addition to the weights, and temporary buffers.

    Args:
        weights: module name -> W [N_i, K], any float dtype, all on one device. The order of the names matters.
        specs: module name -> spec; all must have the same input transform (K, rotation sizes, rank, bits, clip).
        biases: module name -> bias [N_i] to include unchanged in the result. Linears without an entry here get no
            bias in the result, even if their spec has one.
        seed: seed of all randomness, together with the names: the same call gives the same bytes.
        options: None for the defaults.

    Raises:
        SourceError: weights, biases and specs do not fit together, a value is not finite, or the rank exceeds the
            group's size. Raised before quantization starts.
    """
    options = options or DataFreeOptions()
    biases = biases or {}
    spec = check_group(weights, biases, specs)
    generator = group_generator(seed, weights)
    rotation = learn_rotation(
        list(weights.values()),
        (spec.rotation_groups, spec.n1, spec.n2),
        rounds=options.okt_rounds,
        generator=generator,
        start=options.start,
    )
    rotated = _rotate_rows(list(weights.values()), rotation)
    shared = {"rotation_left": rotation.left, "rotation_right": rotation.right}
    b, a, psp_trace = _low_rank(rotated, spec.rank, generator, options)
    low_rank_b, residual = b.to(torch.bfloat16), rotated
    if spec.rank:
        shared["low_rank_a"] = rotate_back(a, rotation.left, rotation.right).to(torch.bfloat16)
        stored_a = rotate(shared["low_rank_a"], rotation.left, rotation.right)
        residual = torch.addmm(rotated, low_rank_b.float(), stored_a, alpha=-1.0)
    del rotated
    scales = fit_scales(residual, rounds=options.scale_rounds)
    if options.unbiased:
        scales = unbiased(residual, scales)
    shared["column_scale"] = scales.column

    tensors = store_group(weights, specs, biases, shared, residual, scales.row, low_rank_b)
    errors = {name: relative_error(weights[name], stored, specs[name]) for name, stored in tensors.items()}
    traces = {rotation.objective: rotation.trace, "psp": psp_trace, "scales": scales.trace}
    return GroupResult(tensors, errors, traces)


def _rotate_rows(weights: list[Tensor], rotation: Rotation) -> Tensor:
    """Rotate the rows of all weights, float32 [sum of N_i, K]."""
    rows = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=torch.float32)
    parts = (part for weight in weights for part in split_rows(weight))
    in_one_buffer((rotate(part.float(), rotation.left, rotation.right) for part in parts), rows.view(-1))
    return rows


def _low_rank(
    rotated: Tensor, rank: int, generator: torch.Generator, options: DataFreeOptions
) -> tuple[Tensor, Tensor, list[float]]:
    """Return the factors b [N, r] and a [r, K] in the rotated basis, float32, and the trace of PSP."""
    mean_rank = int(options.row_mean and rank > 0)
    fitted = proximal_low_rank(rotated, rank - mean_rank, rounds=options.psp_rounds, generator=generator)
    if not mean_rank:
        return fitted.b, fitted.a, fitted.trace
    mean = rotated.mean(1, keepdim=True) - fitted.b @ fitted.a.mean(1, keepdim=True)
    return torch.cat([fitted.b, mean], 1), torch.cat([fitted.a, torch.ones_like(rotated[:1])]), fitted.trace

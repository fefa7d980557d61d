"""Recipe `paper`: one input group by OKT, PSP, signs and scales, from its weights alone (arXiv 2605.00422).

No calibration data, no Hessian, no tuning. The order is the paper's: learn the rotation, take out the
low-rank part, row and column scales, sign. What is stored is rounded before what depends on it is computed:
signs and scales see the residual of the bfloat16 low-rank factors, errors are measured on the stored tensors.
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
from bwla_converter.quantize.okt import Rotation, Start, learn_rotation
from bwla_converter.quantize.psp import proximal_low_rank
from bwla_kernels.format import LayerSpec
from bwla_kernels.reference import rotate, rotate_back
from torch import Tensor


@dataclass(frozen=True)
class PaperOptions:
    """What the recipe leaves open.

    Attributes:
        okt_rounds, psp_rounds: the paper's 40 and 20.
        scale_rounds: alternations of row and column scales.
        start: start of the rotation.
        unbiased: rescale the rows so that the signs keep all of the weight instead of its least-squares
            share. The weight's distance grows and the model's loss falls (`binarize` says why).
        row_mean: spend one rank on the row means of the residual (the paper's row centring) instead of one
            more direction of the low-rank part. Off: a free direction removes several times as much error.
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
    options: PaperOptions | None = None,
) -> GroupResult:
    """Quantize the linears that read one input.

    Holds two copies of the group's weights in float32 beside the weights themselves, and work space.

    Args:
        weights: module name -> W [N_i, K], any float dtype, one device. The order of the names matters.
        specs: module name -> what to make of it; one input side (K, rotation sizes, rank, bits, clip).
        biases: module name -> bias [N_i], for what is to be among the results, as it is. A linear with a bias
            that is not given is done without: the bias stays with the caller.
        seed: with the names, seeds everything random: the same call gives the same bytes.
        options: None for the defaults.

    Raises:
        SourceError: weights, biases and specs do not fit together, a value is not finite, or the rank is
            larger than the group; before any work.
    """
    options = options or PaperOptions()
    biases = biases or {}
    side = check_group(weights, biases, specs)
    generator = group_generator(seed, weights)
    rotation = learn_rotation(
        list(weights.values()),
        (side.rotation_groups, side.n1, side.n2),
        rounds=options.okt_rounds,
        generator=generator,
        start=options.start,
    )
    rotated = _rotate_rows(list(weights.values()), rotation)
    shared = {"rotation_left": rotation.left, "rotation_right": rotation.right}
    b, a, psp_trace = _low_rank(rotated, side.rank, generator, options)
    low_rank_b, residual = b.to(torch.bfloat16), rotated
    if side.rank:
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
    traces = {"okt": rotation.trace, "psp": psp_trace, "scales": scales.trace}
    return GroupResult(tensors, errors, traces)


def _rotate_rows(weights: list[Tensor], rotation: Rotation) -> Tensor:
    """The pooled rows in the rotated basis, float32 [sum of N_i, K]."""
    rows = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=torch.float32)
    parts = (part for weight in weights for part in split_rows(weight))
    in_one_buffer((rotate(part.float(), rotation.left, rotation.right) for part in parts), rows.view(-1))
    return rows


def _low_rank(
    rotated: Tensor, rank: int, generator: torch.Generator, options: PaperOptions
) -> tuple[Tensor, Tensor, list[float]]:
    """The factors b [N, r], a [r, K] in the rotated basis, float32, and the trace."""
    means = int(options.row_mean and rank > 0)
    low = proximal_low_rank(rotated, rank - means, rounds=options.psp_rounds, generator=generator)
    if not means:
        return low.b, low.a, low.trace
    mean = rotated.mean(1, keepdim=True) - low.b @ low.a.mean(1, keepdim=True)
    return torch.cat([low.b, mean], 1), torch.cat([low.a, torch.ones_like(rotated[:1])]), low.trace

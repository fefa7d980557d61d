"""Recipe `paper`: one input group by OKT, PSP, signs and scales, from its weights alone (arXiv 2605.00422).

No calibration data, no Hessian, no tuning. The order is the paper's: learn the rotation, take out the
low-rank part, row and column scales, sign. What is stored is rounded before what depends on it is computed:
signs and scales see the residual of the bfloat16 low-rank factors, errors are measured on the stored tensors.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from bwla_converter.binarize import fit_scales, signs, unbiased
from bwla_converter.okt import Rotation, Start, count_not_finite, in_one_buffer, learn_rotation, split_rows
from bwla_converter.psp import proximal_low_rank
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec, TensorSpec, pack_signs, tensor_specs, validate_layer
from bwla_kernels.format.layer import FLOAT_DTYPES, shape_problem
from bwla_kernels.reference import dequantize, rotate, rotate_back
from torch import Tensor

ROW_TENSORS = ("weight_packed", "weight_scale", "low_rank_b")
"""Tensors of the format with one row for each of the layer's."""


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


@dataclass(frozen=True)
class GroupResult:
    """One quantized input group.

    Attributes:
        tensors: name of the linear -> its tensors as the format stores them (design: the checkpoint).
        errors: name of the linear -> ||W - W'||_F / ||W||_F of the stored tensors (`relative_error`).
        okt_trace: objective of the rotation at the start and after each round, nats per weight.
        psp_trace: the same for the low-rank part; empty for rank 0.
        scale_trace: relative error in the rotated basis with row scales alone, then after each alternation
            of least squares; before `unbiased`.
    """

    tensors: dict[str, dict[str, Tensor]]
    errors: dict[str, float]
    okt_trace: list[float]
    psp_trace: list[float]
    scale_trace: list[float]


def group_generator(seed: int, names: Iterable[str]) -> torch.Generator:
    """A generator that depends on the seed and the group's names alone, not on what was converted before."""
    digest = hashlib.sha256("\n".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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
    side = _check(weights, biases, specs)
    generator = group_generator(seed, weights)
    rotation = learn_rotation(
        list(weights.values()),
        (side.blocks, side.n1, side.n2),
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

    tensors, errors, first = {}, {}, 0
    for name, weight in weights.items():
        spec = replace(specs[name], bias=name in biases)
        rows = slice(first, first + spec.out_features)
        first = rows.stop
        own = {
            "weight_packed": torch.cat([pack_signs(signs(part)) for part in split_rows(residual[rows])]),
            "weight_scale": scales.row[rows],
            "low_rank_b": low_rank_b[rows],
            **({"bias": biases[name]} if spec.bias else {}),
        }
        table = {**shared, **own}
        # In the format's order, each with memory of its own: safetensors refuses shared memory.
        stored = {key: table[key].clone(memory_format=torch.contiguous_format) for key in tensor_specs(spec)}
        validate_layer(name, stored, spec)
        tensors[name], errors[name] = stored, relative_error(weight, stored, spec)
    return GroupResult(tensors, errors, rotation.trace, psp_trace, scales.trace)


def relative_error(weight: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> float:
    """||W - W'||_F / ||W||_F of a stored layer in the basis of the original input; ||W'||_F where W is zero."""
    rest, power, first = 0.0, 0.0, 0
    for part in split_rows(weight):
        rows = slice(first, first + len(part))
        first = rows.stop
        here = {key: value[rows] if key in ROW_TENSORS else value for key, value in tensors.items()}
        rest += float((part.float() - dequantize(here, spec)).double().square().sum())
        power += float(part.double().square().sum())
    return math.sqrt(rest / (power or 1.0))


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


def _check(
    weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]
) -> LayerSpec:
    """Settle everything that can be wrong with the input before work starts; a spec of the input side."""
    advice = "get the checkpoint again or keep the layer out of quantization with --ignore"
    if not weights:
        raise SourceError("an input group: expected at least one weight, found none: name its members")
    for stray in weights.keys() ^ specs.keys() | (biases.keys() - weights.keys()):
        raise SourceError(f"{stray}: expected a weight and a spec, found only part of them: check the plan")
    sides = {name: replace(spec, out_features=1, bias=False) for name, spec in specs.items()}
    side = sides[next(iter(weights))]
    for name, weight in weights.items():
        if sides[name] != side:
            raise SourceError(
                f"{name}: expected the input side of its group, {side}, found {sides[name]}: check the plan"
            )
        problem = _problem(weight, (specs[name].out_features, side.in_features))
        if problem:
            raise SourceError(f"{name}.weight: {problem}; {advice}")
        problem = _problem(biases[name], (specs[name].out_features,)) if name in biases else None
        if problem:
            raise SourceError(f"{name}.bias: {problem}; {advice}")
    limit = min(sum(spec.out_features for spec in specs.values()), side.in_features)
    if side.rank > limit:
        names = ", ".join(weights)
        raise SourceError(
            f"{names}: expected a rank of at most {limit}, found {side.rank}: choose a smaller rank"
        )
    return side


def _problem(tensor: Tensor, shape: tuple[int, ...]) -> str | None:
    """Say in words why `tensor` is no float tensor of `shape` with finite values; None where it is one."""
    dtypes = (*FLOAT_DTYPES, torch.float64) if len(shape) == 2 else FLOAT_DTYPES  # a bias is stored as it is
    problem = shape_problem(TensorSpec(shape, dtypes), tuple(tensor.shape), tensor.dtype)
    if problem:
        return problem
    bad = count_not_finite(tensor.reshape(len(tensor), -1))
    return f"expected finite values, found {bad} of {tensor.numel()} NaN or infinite" if bad else None

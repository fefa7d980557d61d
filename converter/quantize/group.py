"""What every recipe does with an input group: check it, and turn what was found into the stored tensors."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from bwla_converter.common.tensors import count_not_finite, split_rows
from bwla_converter.quantize.binarize import signs
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec, TensorSpec, pack_signs, to_storage_dtype, validate_layer
from bwla_kernels.format.layer import FLOAT_DTYPES, ROW_TENSORS, shape_problem
from bwla_kernels.reference import dequantize
from torch import Tensor


@dataclass(frozen=True)
class GroupResult:
    """One quantized input group.

    Attributes:
        tensors: name of the linear -> its tensors as the format stores them (design: the checkpoint).
        errors: name of the linear -> its relative error: of the weight (`relative_error`), or of the outputs where
            the recipe knows inputs.
        traces: name of an objective -> its values at the start and after each round.
        latents: name of the linear -> what its signs were chosen for, float32 [N, K] in the rotated basis and in
            units of the row's scale, where the recipe was asked to keep it.
        clip: the activation clip that was chosen for the group; None where the spec's stays.
        inputs: evenly spaced tokens of the group's inputs [M, K], for the report; None where the recipe knows none.
    """

    tensors: dict[str, dict[str, Tensor]]
    errors: dict[str, float]
    traces: dict[str, list[float]] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)
    clip: float | None = None
    inputs: Tensor | None = None


def group_generator(seed: int, names: Iterable[str]) -> torch.Generator:
    """A generator that depends on the seed and the group's names alone, not on what was converted before."""
    digest = hashlib.sha256("\n".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def pool_rows(weights: Iterable[Tensor]) -> Tensor:
    """The rows of all members one under the other, float32 [sum of N_i, K]."""
    return torch.cat([weight.float() for weight in weights])


def store_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    biases: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    residual: Tensor,
    scale: Tensor,
    low_rank_b: Tensor,
) -> dict[str, dict[str, Tensor]]:
    """Cut pooled rows into members and pack their signs.

    Args:
        weights, specs, biases: as in a recipe's `quantize_group`.
        shared: the input side that every member stores.
        residual: pooled rows whose signs are stored (0 counts as +1), [N, K].
        scale: row scales, float32 [N].
        low_rank_b: bfloat16 [N, r].

    Returns: the members' tensors as the format stores them.
    """
    tensors, first = {}, 0
    for name in weights:
        spec = replace(specs[name], bias=name in biases)
        rows = slice(first, first + spec.out_features)
        first = rows.stop
        own = {
            "weight_packed": torch.cat([pack_signs(signs(part)) for part in split_rows(residual[rows])]),
            "weight_scale": scale[rows],
            "low_rank_b": low_rank_b[rows],
            **({"bias": biases[name]} if spec.bias else {}),
        }
        table = {**shared, **own}
        stored = to_storage_dtype(table, spec)  # memory of its own each: safetensors refuses shared memory
        validate_layer(name, stored, spec)
        tensors[name] = stored
    return tensors


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


def check_group(
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

"""What all recipes do with an input group: check its weights and specs, and build the tensors that are stored."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from bwla_converter.common.tensors import count_not_finite, split_rows
from bwla_converter.quantize.binarize import signs
from bwla_kernels.errors import SourceError
from bwla_kernels.format import (
    LayerSpec,
    TensorSpec,
    pack_signs,
    tensor_specs,
    to_storage_dtype,
    validate_layer,
)
from bwla_kernels.format.layer import FLOAT_DTYPES, ROW_TENSORS, shape_problem
from bwla_kernels.reference import dequantize
from torch import Tensor


@dataclass(frozen=True)
class GroupResult:
    """One quantized input group.

    Attributes:
        tensors: name of the linear -> its tensors as they are stored, see docs/format.md.
        errors: name of the linear -> its relative error, of the weight (`relative_error`) or, if the recipe uses
            calibration data, of the output.
        traces: name of an objective -> its values at the start and after each round.
        latents: name of the linear -> the values whose signs are stored, float32 [N, K], in the rotated basis and in
            units of the row scale (that of the first plane); empty unless requested.
        clip: the activation clip chosen for the group; None keeps that of the spec.
        inputs: a sample of the group's inputs [M, K] for the report; None if the recipe uses no calibration data.
        starved: names of experts' linears that few calibration tokens reached, see `Moments.starved`.
    """

    tensors: dict[str, dict[str, Tensor]]
    errors: dict[str, float]
    traces: dict[str, list[float]] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)
    clip: float | None = None
    inputs: Tensor | None = None
    starved: tuple[str, ...] = ()


def group_generator(seed: int, names: Iterable[str]) -> torch.Generator:
    """Return a generator that depends only on the seed and the group's names, not on what was converted before."""
    digest = hashlib.sha256("\n".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def pool_rows(weights: Iterable[Tensor]) -> Tensor:
    """Concatenate the rows of all linears, float32 [sum of N_i, K]."""
    return torch.cat([weight.float() for weight in weights])


def store_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    biases: Mapping[str, Tensor],
    input_transform: Mapping[str, Tensor],
    residual: Tensor,
    scale: Tensor,
    low_rank_b: Tensor,
) -> dict[str, dict[str, Tensor]]:
    """Split the rows of an input group by linear and build the tensors of each as they are stored.

    Args:
        weights, specs, biases: as in a recipe's `quantize_group`.
        input_transform: the tensors that all linears of the group share.
        residual: concatenated rows whose signs are stored (the sign of 0 is +1), [N, K], or those of P planes,
            [N, P, K].
        scale: row scales, float32 [N] or [N, P].
        low_rank_b: bfloat16 [N, r].

    Returns: name of the linear -> its tensors.
    """
    tensors, first = {}, 0
    for name in weights:
        spec = replace(specs[name], bias=name in biases)
        rows = slice(first, first + spec.out_features)
        first = rows.stop
        row_tensors = {
            "weight_packed": _packed(residual[rows], spec),
            "weight_scale": scale[rows].reshape(-1, spec.planes).squeeze(1),
            "low_rank_b": low_rank_b[rows],
            **({"bias": biases[name]} if spec.bias else {}),
        }
        # Copies the shared tensors for each linear, because safetensors refuses shared memory.
        stored = to_storage_dtype({**input_transform, **row_tensors}, spec)
        validate_layer(name, stored, spec)
        tensors[name] = stored
    return tensors


def _packed(residual: Tensor, spec: LayerSpec) -> Tensor:
    """Pack the signs of rows [N, K] or [N, P, K] in the shape in which they are stored."""
    rows = residual.reshape(-1, spec.in_features)
    packed = torch.cat([pack_signs(signs(part)) for part in split_rows(rows)])
    return packed.view(tensor_specs(spec)["weight_packed"].shape)


def relative_error(weight: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> float:
    """Return ||W - W'||_F / ||W||_F of a stored linear W' in the basis of the original input; ||W'||_F if W is zero."""
    squared_error, squared_norm, first = 0.0, 0.0, 0
    for part in split_rows(weight):
        rows = slice(first, first + len(part))
        first = rows.stop
        chunk = {key: value[rows] if key in ROW_TENSORS else value for key, value in tensors.items()}
        squared_error += float((part.float() - dequantize(chunk, spec)).double().square().sum())
        squared_norm += float(part.double().square().sum())
    return math.sqrt(squared_error / (squared_norm or 1.0))


def check_group(
    weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]
) -> LayerSpec:
    """Check the input of a recipe's `quantize_group`.

    Returns: the spec of the group's input transform, with one output and no bias.

    Raises:
        SourceError: weights, biases and specs do not fit together, a value is not finite, or the rank exceeds the
            group's size.
    """
    if not weights:
        raise SourceError("input group: expected at least one weight, found none")
    unmatched = weights.keys() ^ specs.keys() | (biases.keys() - weights.keys())
    if unmatched:
        raise SourceError(f"{min(unmatched)}: expected both a weight and a spec, found only one of them")
    shared = {name: replace(spec, out_features=1, bias=False) for name, spec in specs.items()}
    first, spec = next(iter(weights)), shared[next(iter(weights))]
    for name in weights:
        if shared[name] != spec:
            raise SourceError(
                f"{name}: expected the same input transform as {first}, which is in the same input group, {spec}, "
                f"found {shared[name]}"
            )
        _check_tensor(f"{name}.weight", weights[name], (specs[name].out_features, spec.in_features))
        if name in biases:
            _check_tensor(f"{name}.bias", biases[name], (specs[name].out_features,))
    max_rank = min(sum(linear.out_features for linear in specs.values()), spec.in_features)
    if spec.rank > max_rank:
        raise SourceError(
            f"{', '.join(weights)}: expected a rank of at most {max_rank}, found {spec.rank}: choose a smaller --rank"
        )
    return spec


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `SourceError` unless `tensor` is a floating-point tensor of `shape` with finite values."""
    # Weights are converted, so float64 is fine; a bias is stored in its dtype.
    dtypes = (*FLOAT_DTYPES, torch.float64) if len(shape) == 2 else FLOAT_DTYPES
    problem = shape_problem(TensorSpec(shape, dtypes), tuple(tensor.shape), tensor.dtype)
    if not problem:
        count = count_not_finite(tensor.reshape(len(tensor), -1))
        problem = (
            f"expected finite values, found {count} of {tensor.numel()} NaN or infinite" if count else None
        )
    if problem:
        raise SourceError(
            f"{name}: {problem}; download the checkpoint again or exclude the layer with --ignore"
        )

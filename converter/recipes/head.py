"""Quantize the head in binary planes, once a recipe has quantized all decoder layers."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from bwla_converter.calibration.loop import CalibrationLoop
from bwla_converter.quantize import experts, fast
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HEAD_MODULE
from bwla_kernels.format.layer import ROW_TENSORS
from torch import Tensor


def head_of_samples(
    loop: CalibrationLoop,
    final_norm: Mapping[str, Tensor],
    weight: Tensor,
    spec: LayerSpec,
    seed: int,
    options: fast.FastOptions,
) -> GroupResult:
    """Quantize the head for the inputs that the quantized layers and the fitted final norm give it.

    Args:
        loop: the calibration samples after the last layer.
        final_norm: the fitted weight of the final norm by its full name, if it was fitted.
        weight: the head's W [V, K].
        spec, seed, options: as in `quantize_head`.
    """
    moments, inputs = loop.collect_head_moments(final_norm)
    return quantize_head(
        weight.to(loop.store.device),
        spec,
        moments,
        inputs=inputs if options.choose_clip else None,
        seed=seed,
        options=options,
    )


def quantize_head(
    weight: Tensor,
    spec: LayerSpec,
    moments: Moments,
    *,
    inputs: Tensor | None = None,
    seed: int = 0,
    options: fast.FastOptions | None = None,
) -> GroupResult:
    """Quantize a head as recipe `fast` does, for the inputs that it has behind the quantized decoder layers.

    The vocabulary has too many rows to be quantized at once, so chunks of rows are treated as the linears of one group
    of experts, which share an input transform.

    Args:
        weight: W [V, K], any float dtype.
        spec: spec of the head.
        moments: second moments of its inputs.
        inputs: a sample of the inputs [M, K] for choosing the clip; None keeps the spec's clip.
        seed, options: as in `fast.quantize_group`.

    Returns: the quantized head, by its module path; its error is that of the worst chunk.
    """
    chunks = weight.split(experts.CHUNK_ROWS)
    weights = {f"{HEAD_MODULE}.{number}": chunk for number, chunk in enumerate(chunks)}
    specs = {name: replace(spec, out_features=len(chunk), bias=False) for name, chunk in weights.items()}
    method = experts.fast_method(options or fast.FastOptions(), spec.planes)
    result = experts.quantize_group(weights, specs, moments, method, inputs=inputs, seed=seed)
    parts = list(result.tensors.values())
    tensors = {
        key: torch.cat([part[key] for part in parts]) if key in ROW_TENSORS else value
        for key, value in parts[0].items()
    }
    return GroupResult(
        {HEAD_MODULE: tensors}, {HEAD_MODULE: max(result.errors.values())}, result.traces, clip=result.clip
    )

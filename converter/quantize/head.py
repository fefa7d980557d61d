"""Quantize a language-model head in binary planes: as a decoder layer's linear, some rows at a time."""

from dataclasses import replace

import torch
from bwla_converter.quantize import experts, fast
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HEAD_MODULE
from bwla_kernels.format.layer import ROW_TENSORS
from torch import Tensor


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

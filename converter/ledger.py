"""The bits ledger: what a quantized weight costs when everything that is stored for it is counted."""

import math
from collections.abc import Iterable
from dataclasses import replace

from bwla_kernels.format import LayerSpec, tensor_specs

AUTO_RANK_BITS = 1.16
"""The paper's budget: all-in bits per quantized weight that `--rank auto` stays within."""


def stored_bits(spec: LayerSpec) -> int:
    """Bits that a linear's tensors take on disk; its bias, which the original has too, is not counted."""
    tensors = tensor_specs(replace(spec, bias=False)).values()
    return sum(8 * math.prod(tensor.shape) * tensor.dtypes[0].itemsize for tensor in tensors)


def weights_of(spec: LayerSpec) -> int:
    """Weights that a linear quantizes, N * K."""
    return spec.out_features * spec.in_features


def bits_per_weight(specs: Iterable[LayerSpec]) -> float:
    """All-in stored bits per quantized weight."""
    listed = list(specs)
    return sum(map(stored_bits, listed)) / sum(map(weights_of, listed))


def auto_rank(specs: Iterable[LayerSpec], budget: float = AUTO_RANK_BITS) -> int:
    """The largest rank that keeps the whole model at or under `budget` bits per weight; 0 where 1 is too much."""
    listed = [replace(spec, rank=0) for spec in specs]
    room = budget * sum(map(weights_of, listed)) - sum(map(stored_bits, listed))
    one = sum(stored_bits(replace(spec, rank=1)) - stored_bits(spec) for spec in listed)
    widest = min(min(spec.out_features, spec.in_features) for spec in listed)
    return max(0, min(int(room // one), widest))

"""The bits ledger: what a quantized weight costs when everything that is stored for it is counted."""

import math
from collections.abc import Iterable
from dataclasses import replace

from bwla_kernels.factorize import RANK_STEP
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


def fitting_rank(specs: Iterable[LayerSpec], budget: float = AUTO_RANK_BITS) -> int:
    """The largest rank that keeps the whole model at or under `budget` bits per weight; 0 where 1 is too much."""
    listed = [replace(spec, rank=0) for spec in specs]
    room = budget * sum(map(weights_of, listed)) - sum(map(stored_bits, listed))
    one = sum(stored_bits(replace(spec, rank=1)) - stored_bits(spec) for spec in listed)
    widest = min(min(spec.out_features, spec.in_features) for spec in listed)
    return max(0, min(int(room // one), widest))


def auto_rank(fitting: int) -> int:
    """Lower a rank that fits the bits to one that a GPU reads without much waste: 35 -> 32, 23 -> 16, 30 -> 30.

    A kernel reads A [r, K] as it is stored, but B [N, r] in steps of 16 columns, padded, so 35 ranks cost the bytes
    and the time of 48 columns. The ranks beyond the last full step are dropped where they fill less than half of
    another one:

    - Fewer than 8 of 16 columns cost, with N = K, more than 1.5 times the bytes of as many ranks in full steps (3.2
      times for the 3 of 35), and they are the ranks that correct least.
    - 8 or more stay: dropping 14 of Qwen3-14B's 30 would nearly halve its correction to save an almost full step.
    - Up to 16 nothing is dropped. There is no step to fall back to but none, and within one step every rank costs
      a kernel the same, so the largest that fits the bits is the best of them.
    """
    beyond = fitting % RANK_STEP
    return fitting if fitting < RANK_STEP or 2 * beyond >= RANK_STEP else fitting - beyond


def describe_rank(rank: int, fitting: int) -> str:
    """`rank`, and why it is not the largest that `fitting` the bits would allow, in words for a summary."""
    if rank == fitting:
        return f"rank {rank}"
    padded = -(-fitting // RANK_STEP) * RANK_STEP
    return f"rank {rank} ({fitting} would fit the bits, but a GPU pays for {padded})"

"""Bits per weight, everything counted: all that is stored for a quantized linear, divided by its weights."""

from collections.abc import Mapping
from dataclasses import replace

from bwla_converter.common.tensors import tensor_bytes
from bwla_kernels.factorize import RANK_STEP
from bwla_kernels.format import LayerSpec, TensorSpec
from bwla_kernels.format.experts import stored_specs

AUTO_RANK_BITS_PER_WEIGHT = 1.16
"""Bits per weight that `--rank auto` does not exceed, as in the paper."""

PLANES_MARGIN = 0.2
"""Bits per weight beyond the signs that it does not exceed for several planes."""


def tensor_bits(tensor: TensorSpec) -> int:
    """Return the size of a stored tensor in bits."""
    return 8 * tensor_bytes(tensor.shape, tensor.dtypes[0])


def stored_bits(name: str, spec: LayerSpec) -> int:
    """Return the size of a linear's stored tensors in bits, without its bias, which the original model has too."""
    return sum(map(tensor_bits, stored_specs(name, replace(spec, bias=False)).values()))


def total_bits(specs: Mapping[str, LayerSpec]) -> int:
    """Return `stored_bits` of all linears together, given by name."""
    return sum(stored_bits(name, spec) for name, spec in specs.items())


def num_weights(spec: LayerSpec) -> int:
    """Return the number of weights of a linear, N * K."""
    return spec.out_features * spec.in_features


def bits_per_weight(specs: Mapping[str, LayerSpec]) -> float:
    """Return the stored bits per quantized weight of all these linears together, given by name."""
    return total_bits(specs) / sum(map(num_weights, specs.values()))


def describe_planes(count: int) -> str:
    """Return "1 binary plane", "2 binary planes"."""
    return f"{count} binary plane{'s' if count > 1 else ''}"


def rank_budget(planes: int) -> float:
    """Return the bits per weight that `--rank auto` does not exceed."""
    return AUTO_RANK_BITS_PER_WEIGHT if planes == 1 else planes + PLANES_MARGIN


def largest_fitting_rank(specs: Mapping[str, LayerSpec], budget: float = AUTO_RANK_BITS_PER_WEIGHT) -> int:
    """Return the largest rank with at most `budget` bits per weight over all linears; 0 if rank 1 exceeds it."""
    without, with_one = (
        total_bits({name: replace(spec, rank=rank) for name, spec in specs.items()}) for rank in (0, 1)
    )
    free_bits = budget * sum(map(num_weights, specs.values())) - without
    bits_per_rank = with_one - without
    max_rank = min(min(spec.out_features, spec.in_features) for spec in specs.values())
    return max(0, min(int(free_bits // bits_per_rank), max_rank))


def auto_rank(fitting: int) -> int:
    """Lower a rank that fits the budget to one that a GPU reads efficiently: 35 -> 32, 23 -> 16, 30 -> 30.

    A kernel reads A [r, K] as it is stored but pads B [N, r] to a multiple of 16 columns, so rank 35 costs the bytes
    and the time of 48 columns. The ranks beyond the last multiple of 16 are dropped if there are fewer than 8:

    - For N = K, fewer than 8 of 16 columns read more than 1.5 times the bytes per rank of a full step (3.2 times for
      the 3 of rank 35), and the last ranks correct the least.
    - 8 or more are kept. Dropping 14 of Qwen3-14B's 30 ranks would nearly halve its correction and save an almost full
      step.
    - Ranks up to 16 are kept. All of them cost a kernel the same, so the largest that fits the budget is best.
    """
    remainder = fitting % RANK_STEP
    return fitting if fitting < RANK_STEP or 2 * remainder >= RANK_STEP else fitting - remainder


def describe_rank(rank: int, fitting: int) -> str:
    """Describe `rank` for a summary, and why it is less than `fitting`, the largest rank that fits the budget."""
    if rank == fitting:
        return f"rank {rank}"
    padded = -(-fitting // RANK_STEP) * RANK_STEP
    return f"rank {rank} ({fitting} would fit, but a GPU would read {padded} columns)"

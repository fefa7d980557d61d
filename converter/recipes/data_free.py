"""Recipe `data-free`: every input group is quantized from its weights alone."""

from collections.abc import Iterator, Mapping

from bwla_converter.quantize import data_free
from bwla_converter.quantize.group import GroupResult
from bwla_converter.recipes.stateless import StatelessRecipe
from bwla_converter.recipes.workload import (
    FLOAT_BYTES,
    WORKSPACE_BYTES,
    ComputeEstimate,
    MemoryEstimate,
    Workload,
    okt_compute,
    psp_compute,
)
from bwla_kernels.format import LayerSpec
from torch import Tensor


class DataFreeRecipe(StatelessRecipe):
    """`data-free`: OKT, PSP, signs and scales, without calibration data."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Quantize an input group by OKT, PSP, signs and scales."""
        return data_free.quantize_group(weights, specs, seed=self.seed)

    @staticmethod
    def memory_estimates(workload: Workload) -> Iterator[MemoryEstimate]:
        """Yield the memory of each group: its layer as stored, and four float32 copies of the group's weights."""
        for layer in workload.distinct_layers():
            for label, group in layer.groups:
                num_bytes = layer.stored_bytes + 4 * FLOAT_BYTES * group.weights + WORKSPACE_BYTES
                yield MemoryEstimate(num_bytes, f"layer {layer.index}, {label}")

    @staticmethod
    def compute_estimate(workload: Workload) -> ComputeEstimate:
        """Estimate OKT, PSP and the fit of the scales of all groups."""
        options, total = data_free.DataFreeOptions(), ComputeEstimate()
        for group in workload.groups():
            total += okt_compute(group, options.okt_rounds)
            total += psp_compute(group, workload.rank, options.psp_rounds)
            total += ComputeEstimate(bytes_moved=4 * FLOAT_BYTES * group.weights * options.scale_rounds)
        return total

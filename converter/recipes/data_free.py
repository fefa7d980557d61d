"""Recipe `data-free`: every input group is quantized from its weights alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from bwla_converter.calibration.activations import StoredStates
from bwla_converter.quantize import data_free
from bwla_converter.quantize.group import GroupResult
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


class DataFreeRecipe:
    """`data-free`: OKT, PSP, signs and scales, without calibration data."""

    needs_calibration: ClassVar[bool] = False
    models: ClassVar[int] = 0

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calibration: dict[str, object] = {}
        self.layer_traces: dict[str, dict[str, list[float]]] = {}

    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing: groups are independent of each other."""

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Quantize an input group by OKT, PSP, signs and scales."""
        return data_free.quantize_group(weights, specs, seed=self.seed)

    def end_layer(self) -> Mapping[str, Tensor]:
        """Return no further changes."""
        return {}

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """Return an empty state: layers are independent of each other."""
        return {}

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Do nothing: there is no state."""

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Return no further changes."""
        return {}

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

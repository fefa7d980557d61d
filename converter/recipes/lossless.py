"""Recipe `lossless`: weights that have one bit or three values already are stored as they are."""

from collections.abc import Iterator, Mapping

from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.lossless import store_lossless
from bwla_converter.recipes.stateless import StatelessRecipe
from bwla_converter.recipes.workload import (
    FLOAT_BYTES,
    WORKSPACE_BYTES,
    ComputeEstimate,
    MemoryEstimate,
    Workload,
)
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HEAD_MODULE
from torch import Tensor

PASSES = 8
"""Times that a weight is read or written, as float32, to be stored."""


class LosslessRecipe(StatelessRecipe):
    """`lossless`: the same weights in binary planes with scales for groups of columns."""

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Store the weights of an input group.

        Raises:
            SourceError: a weight holds other values than its spec can express.
        """
        tensors = {name: store_lossless(name, weight, specs[name]) for name, weight in weights.items()}
        return GroupResult(tensors, dict.fromkeys(tensors, 0.0))

    def quantize_head(self, weight: Tensor, spec: LayerSpec) -> GroupResult:
        """Store the head. Raises as `quantize` does."""
        return self.quantize({HEAD_MODULE: weight}, {HEAD_MODULE: spec})

    @staticmethod
    def memory_estimates(workload: Workload) -> Iterator[MemoryEstimate]:
        """Yield the memory of each group: its layer as stored, its signs, and the work space of some rows."""
        for layer in workload.distinct_layers():
            for label, group in layer.groups:
                num_bytes = layer.stored_bytes + group.weights + WORKSPACE_BYTES
                yield MemoryEstimate(num_bytes, f"layer {layer.index}, {label}")

    @staticmethod
    def compute_estimate(workload: Workload) -> ComputeEstimate:
        """Estimate reading, comparing and packing all weights."""
        weights = sum(group.weights for group in workload.groups())
        return ComputeEstimate(bytes_moved=PASSES * FLOAT_BYTES * weights)

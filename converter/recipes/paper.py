"""Recipe `paper`: the publication's rotation and low-rank correction, binarized for the inputs of calibration samples.

See `quantize.paper` for what the publication states and what it leaves open.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from bwla_converter.calibration.activations import ActivationStore, StoredStates
from bwla_converter.calibration.loop import CalibrationLoop
from bwla_converter.options import Calibration
from bwla_converter.quantize import experts, paper
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_converter.recipes.fast import (
    FACTORIZATIONS,
    SAVING,
    binarization_compute,
    moments_bytes,
    quantize_group_bytes,
    text_compute,
)
from bwla_converter.recipes.workload import (
    FLOAT_BYTES,
    WORKSPACE_BYTES,
    ComputeEstimate,
    MemoryEstimate,
    Workload,
    okt_compute,
    psp_compute,
)
from bwla_converter.source.model import Source
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import has_experts
from torch import Tensor


class PaperRecipe:
    """`paper`.

    Args:
        source: the model.
        calibration: the calibration data.
        seed: seed of the choice of samples and of everything random.
        options: hyperparameters; None for the defaults.
        store: where the hidden states are kept; None for in memory.
    """

    needs_calibration: ClassVar[bool] = True
    models: ClassVar[int] = 1

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        seed: int,
        options: paper.PaperOptions | None = None,
        store: ActivationStore | None = None,
    ) -> None:
        self.seed, self.options = seed, options or paper.PaperOptions()
        self.loop = CalibrationLoop(
            source, calibration, seed, self._quantize_group, store, run_original=False
        )
        self.calibration = self.loop.description
        self.layer_traces: dict[str, dict[str, list[float]]] = {}

    def _quantize_group(
        self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        if has_experts(weights):
            method = experts.paper_method(self.options)
            return experts.quantize_group(weights, specs, moments, method, inputs=inputs, seed=self.seed)
        return paper.quantize_group(
            weights, specs, moments, inputs=inputs, seed=self.seed, options=self.options
        )

    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Build the decoder layer."""
        self.loop.begin_layer(index, tensors)

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Quantize an input group for its inputs."""
        return self.loop.quantize(weights, specs)

    def end_layer(self) -> Mapping[str, Tensor]:
        """Run the samples through the quantized layer; return no further changes."""
        self.loop.end_layer()
        return {}

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """Return the samples' hidden states."""
        return self.loop.state()

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Take the samples' hidden states from `state`."""
        self.loop.restore(state)

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Return no further changes."""
        return {}

    @staticmethod
    def memory_estimates(workload: Workload) -> Iterator[MemoryEstimate]:
        """Yield the memory of quantizing each group and of collecting its moments.

        Both hold the layer as stored, and the quantized layer's linears that are still unquantized.
        """
        for layer in workload.distinct_layers():
            for number, (label, group) in enumerate(layer.groups):
                unquantized = sum(other.weights for _, other in layer.groups[number:])
                held = layer.stored_bytes + FLOAT_BYTES * unquantized + WORKSPACE_BYTES
                step = f"layer {layer.index}, {label}"
                yield MemoryEstimate(held + quantize_group_bytes(group, workload.device), step)
                yield MemoryEstimate(held + moments_bytes(layer, group, workload), f"{step}, its inputs")

    @staticmethod
    def compute_estimate(workload: Workload) -> ComputeEstimate:
        """Estimate OKT, PSP, the choice of signs, the moments, and the samples' way through the quantized model."""
        options, total = paper.PaperOptions(), ComputeEstimate()
        for group in workload.groups():
            total += okt_compute(group, options.okt_rounds)
            total += psp_compute(group, workload.rank, options.psp_rounds)
            total += binarization_compute(group, options.efforts, workload.device)
            total += ComputeEstimate(flops=FACTORIZATIONS * group.factorizations * group.columns**3)
            total += text_compute(group, workload.tokens, PaperRecipe.models)
        saved = workload.hidden_bytes * workload.source.num_layers
        return total + ComputeEstimate(bytes_moved=SAVING * saved)

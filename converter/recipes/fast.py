"""Recipe `fast`: every input group is quantized in closed form for the inputs that calibration samples give it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from bwla_converter.calibration.activations import ActivationStore, StoredStates
from bwla_converter.calibration.loop import CalibrationLoop, QuantizeGroup
from bwla_converter.calibration.stepwise import SAMPLES_PER_BATCH
from bwla_converter.options import Calibration
from bwla_converter.quantize import fast
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_converter.recipes.workload import (
    FLOAT_BYTES,
    WORKSPACE_BYTES,
    ComputeEstimate,
    GroupShape,
    LayerShape,
    MemoryEstimate,
    Workload,
    okt_compute,
)
from bwla_converter.source.model import Source
from bwla_kernels.cpu.library import available
from bwla_kernels.format import LayerSpec
from bwla_kernels.gptq_binary import row_chunk_elements
from torch import Tensor


def closed_form(seed: int, options: fast.FastOptions) -> QuantizeGroup:
    """Return the function by which `fast` and `best` quantize an input group."""

    def quantize_group(
        weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        return fast.quantize_group(weights, specs, moments, inputs=inputs, seed=seed, options=options)

    return quantize_group


class FastRecipe:
    """`fast`.

    Args:
        source: the model.
        calibration: the calibration data.
        seed: seed of the choice of samples and of everything random.
        options: hyperparameters; None for the defaults.
        store: where the hidden states are kept; None for in memory.
    """

    needs_calibration: ClassVar[bool] = True

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        seed: int,
        options: fast.FastOptions | None = None,
        store: ActivationStore | None = None,
    ) -> None:
        self.options = options or fast.FastOptions()
        quantize_group = closed_form(seed, self.options)
        self.loop = CalibrationLoop(
            source, calibration, seed, quantize_group, store, self.options.compensate_residual_stream
        )
        self.calibration = self.loop.description
        self.layer_traces: dict[str, dict[str, list[float]]] = {}

    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Build the decoder layer."""
        self.loop.begin_layer(index, tensors)

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Quantize an input group for its inputs."""
        return self.loop.quantize(weights, specs)

    def end_layer(self) -> Mapping[str, Tensor]:
        """Run the samples through the layer; return no further changes."""
        self.loop.end_layer()
        return {}

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """Return the samples' hidden states."""
        return self.loop.state()

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Take the samples' hidden states from `state`."""
        self.loop.restore(state)

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Return the final norm, fitted to the quantized layers."""
        return self.fitted_norm()

    def fitted_norm(self) -> dict[str, Tensor]:
        """Return the fitted final norm's weight by its full name; nothing where the options leave it as it is."""
        return self.loop.fit_final_norm() if self.options.final_norm else {}

    @staticmethod
    def memory_estimates(workload: Workload) -> Iterator[MemoryEstimate]:
        """Yield the memory of quantizing each group and of collecting its moments.

        Both hold the layer as stored, the original in float32, and the quantized layer's linears that are still
        unquantized.
        """
        for layer in workload.distinct_layers():
            for number, (label, group) in enumerate(layer.groups):
                unquantized = sum(other.weights for _, other in layer.groups[number:])
                held = layer.stored_bytes + FLOAT_BYTES * (layer.weights + unquantized) + WORKSPACE_BYTES
                step = f"layer {layer.index}, {label}"
                yield MemoryEstimate(held + _quantize_group_bytes(group, workload.device), step)
                yield MemoryEstimate(held + _moments_bytes(layer, group, workload), f"{step}, its inputs")

    @staticmethod
    def compute_estimate(workload: Workload) -> ComputeEstimate:
        """Estimate OKT, the choice of signs, the moments, and the samples' way through both models."""
        options, total = fast.FastOptions(), ComputeEstimate()
        for group in workload.groups():
            total += okt_compute(group, options.okt_rounds)
            total += _binarization_compute(group, options.passes, workload.device)
            total += ComputeEstimate(flops=_FACTORIZATIONS * group.columns**3)
            total += _text_compute(group, workload.tokens)
        return total


_FACTORIZATIONS = 25
"""Operations, in units of K^3, of factorizing H and of solving for the target and the column scales, in float64."""


def _text_compute(group: GroupShape, tokens: int) -> ComputeEstimate:
    """Estimate the moments, the products of both models, and the element-wise work on `tokens` tokens."""
    moments = 2 * 2 * tokens * group.square + 2 * tokens * group.weights
    products = 2 * 2 * tokens * group.weights
    elements = 12 * tokens * (group.rows + 2 * group.columns)
    return ComputeEstimate(bytes_moved=FLOAT_BYTES * elements, fast_flops=moments + products)


def _binarization_compute(group: GroupShape, passes: int, device: str) -> ComputeEstimate:
    """Estimate the choice of signs, in `passes` over all of them.

    The factors are measured: the compiled kernel takes as long as 2.8 operations of a matrix product per pass, row and
    element of H; the reference implementation on top of its products moves 530 bytes per pass and weight.
    """
    products = passes * group.rows * group.square
    if device == "cpu" and available()[0]:
        return ComputeEstimate(2.8 * products)
    return ComputeEstimate(4 * products, passes * 530 * group.weights)


def _quantize_group_bytes(group: GroupShape, device: str) -> float:
    """Return the memory of the largest step of `fast.quantize_group`, the moments included."""
    target = 7 * group.weights + 7 * group.square  # cholesky_solve in float64
    inverse = 3 * group.weights + 11 * group.square  # inverse_cholesky in float64
    at_once = min(group.weights, row_chunk_elements(device))
    signs = 5 * group.weights + 15 * at_once + 4 * group.square  # GPTQ and coordinate descent
    return float(FLOAT_BYTES * max(target, inverse, signs))


def _moments_bytes(layer: LayerShape, group: GroupShape, workload: Workload) -> float:
    """Return the memory of the activations of one batch in a layer, and of the moments of a group's inputs."""
    tokens = workload.batch_tokens(SAMPLES_PER_BATCH)
    widths = sum(other.rows for _, other in layer.groups) + 4 * layer.groups[0][1].columns
    return float(FLOAT_BYTES * (tokens * (widths + 2 * group.columns) + 2 * group.square))

"""Recipe `fast`: every input group is quantized in closed form for the inputs that calibration samples give it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bwla_converter.calibration.activations import ActivationStore, StoredStates
from bwla_converter.calibration.loop import CalibrationLoop, QuantizeGroup
from bwla_converter.calibration.stepwise import SAMPLES_PER_BATCH
from bwla_converter.options import Calibration
from bwla_converter.quantize import experts, fast
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_converter.recipes.head import head_of_samples
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
from bwla_kernels.format.experts import has_experts
from bwla_kernels.sign_search import Effort, row_chunk_elements
from torch import Tensor


def closed_form(seed: int, options: fast.FastOptions) -> QuantizeGroup:
    """Return the function by which `fast` and `best` quantize an input group."""

    def quantize_group(
        weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        if has_experts(weights):
            method = experts.fast_method(options, next(iter(specs.values())).planes)
            return experts.quantize_group(weights, specs, moments, method, inputs=inputs, seed=seed)
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
    models: ClassVar[int] = 2

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        seed: int,
        options: fast.FastOptions | None = None,
        store: ActivationStore | None = None,
    ) -> None:
        self.seed, self.options = seed, options or fast.FastOptions()
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

    def quantize_head(self, weight: Tensor, spec: LayerSpec) -> GroupResult:
        """Quantize the head W [V, K] in binary planes, once all layers are quantized."""
        return head_of_samples(self.loop, self.fitted_norm(), weight, spec, self.seed, self.options)

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
                yield MemoryEstimate(held + quantize_group_bytes(group, workload.device), step)
                yield MemoryEstimate(held + moments_bytes(layer, group, workload), f"{step}, its inputs")

    @staticmethod
    def compute_estimate(workload: Workload) -> ComputeEstimate:
        """Estimate OKT, the choice of signs, the moments, and the samples' way through both models."""
        options, total = fast.FastOptions(), ComputeEstimate()
        for group in workload.groups():
            total += okt_compute(group, options.okt_rounds)
            total += binarization_compute(group, options.efforts, workload.device)
            total += ComputeEstimate(flops=FACTORIZATIONS * group.factorizations * group.columns**3)
            total += text_compute(group, workload.tokens)
        saved = FastRecipe.models * workload.hidden_bytes * workload.source.num_layers
        return total + ComputeEstimate(bytes_moved=SAVING * saved)


FACTORIZATIONS = 2.5
"""Operations of float32 products, in units of K^3, that take as long as three factorizations of H, two in float64."""

SAVING = 36
"""Bytes moved that take as long as saving and hashing a byte of the hidden states of a model after a layer."""

STORED_BESIDE_SIGNS = 0.03
"""Bytes per weight of scales, B and each linear's copy of the input transform while experts are quantized."""

_SEARCH_BYTES = 1300
"""Bytes per weight that the sign search moves around its products and sweeps: transposed copies, candidates, sums."""


def text_compute(group: GroupShape, tokens: int, models: int = 2) -> ComputeEstimate:
    """Estimate the moments, and the products and element-wise work of each model, on `tokens` tokens."""
    # About 0.6 of the Gram matrix is computed; with two models, also E[x x_hat^T] or, from two products, E[e x_hat^T].
    used = group.used_rows * group.columns
    cross = min(group.square, 2 * group.weights) if models > 1 else 0
    moments = 2 * tokens * (0.6 * group.square + cross)
    products = models * 2 * tokens * used
    elements = 6 * models * tokens * (group.used_rows + 2 * group.columns)
    return ComputeEstimate(bytes_moved=FLOAT_BYTES * elements, fast_flops=moments + products)


def binarization_compute(group: GroupShape, efforts: Sequence[Effort], device: str) -> ComputeEstimate:
    """Estimate the sign search of all rounds, and the solution and the product for the target.

    The factors are measured: a sweep of the compiled kernel takes as long as 0.4 operations of a matrix product per row
    and element of H; the reference implementation moves 530 bytes per weight and sweep on top of its products.
    """
    product = 2.0 * group.rows * group.square
    sweeps = group.planes * sum(effort.sweeps for effort in efforts)
    fast_flops = group.planes * product * sum(effort.products for effort in efforts)
    copied = _SEARCH_BYTES * group.planes * group.weights
    if device == "cpu" and available()[0]:
        return ComputeEstimate(product * (2 + 0.2 * sweeps), copied, fast_flops)
    return ComputeEstimate(2 * product, copied + sweeps * 530 * group.weights, fast_flops + sweeps * product)


def quantize_group_bytes(group: GroupShape, device: str) -> float:
    """Return the memory of the largest step of quantizing a group, the moments included.

    Of experts, some rows are quantized at a time; what is stored of the others is added.
    """
    weights, beside = group.weights, 0.0
    if group.experts:
        weights = min(weights, max(experts.SAMPLE_ROWS, experts.CHUNK_ROWS) * group.columns)
        moments = 2 * group.square * group.experts * group.own_moments
        beside = FLOAT_BYTES * moments + group.weights * (group.planes / 8 + STORED_BESIDE_SIGNS)
    target = 5 * weights + 9 * group.square  # with a factorization in float64
    factors = 4 * weights + 12 * group.square  # also in float64
    column_scales = 10 * weights + 7 * group.square
    at_once = min(weights, row_chunk_elements(device))
    signs = (7 + group.planes) * weights + 18 * at_once + 5 * group.square
    return FLOAT_BYTES * max(target, factors, column_scales, signs) + beside


def moments_bytes(layer: LayerShape, group: GroupShape, workload: Workload) -> float:
    """Return the memory of the activations of one batch in a layer, and of the moments of a group's inputs."""
    tokens = workload.batch_tokens(SAMPLES_PER_BATCH)
    widths = sum(other.used_rows for _, other in layer.groups) + 4 * layer.groups[0][1].columns
    return float(FLOAT_BYTES * (tokens * (widths + 2 * group.columns) + 2 * group.square))


def head_cost(spec: LayerSpec | None, device: str) -> tuple[list[MemoryEstimate], ComputeEstimate]:
    """Estimate the memory and the work of quantizing the head; none for one in 8 or 16 bits."""
    if spec is None:
        return [], ComputeEstimate()
    shape = GroupShape(spec.out_features, spec.in_features, spec.planes)
    chunk = GroupShape(min(spec.out_features, experts.CHUNK_ROWS), spec.in_features, spec.planes)
    held = 2 * shape.weights + spec.planes * shape.weights // 8
    memory = MemoryEstimate(held + quantize_group_bytes(chunk, device) + WORKSPACE_BYTES, "the head")
    return [memory], binarization_compute(shape, fast.FastOptions().efforts, device)

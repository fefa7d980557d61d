"""Recipe `best`: `fast`, then every decoder layer tuned by gradients, then the whole model distilled.

A layer is tuned on the hidden states that the quantized layers before it produce, towards the original model's hidden
states after it. It thus also compensates the error of the layers before (error propagation mitigation; NanoQuant's
ablation attributes most of the quality of one-bit models to it).
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from bwla_converter.calibration.activations import Activations, ActivationStore, StoredStates
from bwla_converter.calibration.layer_runner import DecoderLayer
from bwla_converter.calibration.loop import CalibrationLoop, clipped_specs
from bwla_converter.calibration.stepwise import SAMPLES_PER_BATCH
from bwla_converter.common.bits import num_weights
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.options import Calibration
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.quantize.group import GroupResult, group_generator
from bwla_converter.recipes.fast import FastRecipe, closed_form
from bwla_converter.recipes.head import head_of_samples
from bwla_converter.recipes.workload import (
    FLOAT_BYTES,
    WORKSPACE_BYTES,
    ComputeEstimate,
    GroupShape,
    LayerShape,
    MemoryEstimate,
    Workload,
)
from bwla_converter.source.model import Source
from bwla_converter.training.distill import DISTILLATION, Distiller
from bwla_converter.training.divergence import chunk_logits
from bwla_converter.training.optimize import TuneOptions, parameter_groups, tune
from bwla_converter.training.stages import make_stages
from bwla_converter.training.ste_linear import STELinear, clear_input_caches, norm_weights, ste_group
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import stores
from bwla_kernels.precision import fast_products
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestOptions:
    """Hyperparameters of the `best` recipe: of its groups, of the tuning of each layer, of the distillation."""

    fast: FastOptions = field(default_factory=FastOptions)
    tune: TuneOptions = field(default_factory=TuneOptions)
    distill: TuneOptions = DISTILLATION


def relative_loss(hidden: Tensor, original: Tensor) -> Tensor:
    """Return the mean over tokens of ||hidden - original||^2 / ||original||^2, for hidden states [..., hidden].

    Dividing by each token's own norm corresponds to the norms that read the hidden states. Otherwise the few tokens
    whose hidden states are hundreds of times larger than all others would dominate the loss.
    """
    return ((hidden - original).square().sum(-1) / original.square().sum(-1)).mean()


@dataclass(frozen=True)
class LayerBackup:
    """The linears and norm weights of a decoder layer, to roll back its tuning."""

    linears: dict[str, nn.Module]
    norms: dict[str, Tensor]

    @classmethod
    def of(cls, layer: DecoderLayer, names: Iterable[str]) -> "LayerBackup":
        """Back up the layer's norms and the linears of the given full names."""
        norms = {name: value.clone() for name, value in norm_weights(layer.layer).items()}
        return cls({name: layer.linear(name) for name in names}, norms)

    def restore(self, layer: DecoderLayer) -> None:
        """Put the linears and norm weights back into the layer."""
        for name, linear in self.linears.items():
            layer.replace(name, linear)
        for name, parameter in norm_weights(layer.layer).items():
            parameter.data.copy_(self.norms[name])


class BestRecipe:
    """`best`. Arguments as in `FastRecipe`."""

    needs_calibration: ClassVar[bool] = True
    models: ClassVar[int] = 2

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        seed: int,
        options: BestOptions | None = None,
        store: ActivationStore | None = None,
    ) -> None:
        self.seed, self.options = seed, options or BestOptions()
        if self.options.distill.epochs and not source.structure.has_head:
            raise SourceError(
                f"{source.folder}: expected a model with a language-model head, whose predictions are distilled, found "
                f"{source.structure.architecture}, which has none: use recipe fast, or --distill-epochs 0"
            )
        fast = replace(self.options.fast, keep_latents=self.options.tune.epochs > 0)
        self.loop = CalibrationLoop(
            source, calibration, seed, closed_form(seed, fast), store, fast.compensate_residual_stream
        )
        self.calibration = self.loop.description
        self.layer_traces: dict[str, dict[str, list[float]]] = {}
        self.divergence: list[float] = []
        self._results: list[tuple[GroupResult, Mapping[str, LayerSpec]]] = []

    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Build the decoder layer."""
        self._results = []
        self.loop.begin_layer(index, tensors)

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Quantize an input group as `fast` does; keep the result for the tuning of the layer."""
        result = self.loop.quantize(weights, specs)
        self._results.append((result, clipped_specs(specs, result.clip)))
        return result

    def end_layer(self) -> Mapping[str, Tensor]:
        """Tune the layer and return the tensors that changed; tuning that does not reduce the loss is rolled back."""
        _, quantized = self.loop.layers
        self.loop.advance_original()
        outputs = self.loop.quantized_outputs()
        changed: dict[str, Tensor] = {}
        if self.options.tune.epochs:
            loss = self._loss(outputs.hidden)
            backup = LayerBackup.of(
                quantized, [name for result, _ in self._results for name in result.tensors]
            )
            changed = self._tune(quantized)
            tuned_outputs = self.loop.quantized_outputs()
            if self._loss(tuned_outputs.hidden) < loss:
                outputs = tuned_outputs
            else:
                log.warning(
                    "%s: tuning did not bring it closer to the original and is rolled back: try more "
                    "--num-calibration-samples",
                    quantized.prefix.removesuffix("."),
                )
                backup.restore(quantized)
                changed = {}
        self.loop.advance_quantized(outputs)
        self._results = []
        return changed

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """Return the samples' hidden states."""
        return self.loop.state()

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Take the samples' hidden states from `state`."""
        self.loop.restore(state)

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Fit the final norm, then distill the whole model."""
        if not self.options.distill.epochs:
            return self.fitted_norm()
        runner = self.loop.runner
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=runner.dtype, attn_implementation=runner.attention
        )
        return self.distill(model)

    def fitted_norm(self) -> dict[str, Tensor]:
        """Return the fitted final norm's weight by its full name; nothing where the options leave it as it is."""
        return self.loop.fit_final_norm() if self.options.fast.final_norm else {}

    def distill(self, model: PreTrainedModel) -> Mapping[str, Tensor]:
        """Distill a quantized model, which is modified; return the stored tensors that changed."""
        distiller = Distiller(
            model,
            self.loop.runner,
            self.loop.ids,
            self.loop.original_hidden,
            self.options.distill,
            self.fitted_norm(),
        )
        changed, self.divergence = distiller.run(self.seed)
        log.info(
            "distillation: divergence from the original %.4f -> %.4f nats",
            self.divergence[0],
            self.divergence[-1],
        )
        return changed

    def _loss(self, outputs: Activations) -> float:
        """Return the tuning loss over all samples."""
        pairs = zip(outputs.split(1), self.loop.original_hidden.split(1), strict=True)
        return sum(float(relative_loss(hidden, original)) for hidden, original in pairs) / len(outputs)

    def _tune(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Tune the quantized layer, put the results into it as they are stored, and return them."""
        linears: dict[str, STELinear] = {}
        for result, specs in self._results:
            linears |= ste_group(layer, result.tensors, specs, result.latents)
        entries = self.loop.runner.source.entries
        norms = {
            name: weight
            for name, weight in norm_weights(layer.layer).items()
            if f"{layer.prefix}{name}" in entries
        }
        for parameter in norms.values():
            parameter.requires_grad_(True)

        def loss_of(indices: Tensor) -> Tensor:
            return relative_loss(layer.run(self.loop.samples[indices]), self.loop.original_hidden[indices])

        with fast_products(self.loop.runner.device):
            trace = tune(
                loss_of,
                parameter_groups(linears.values(), norms.values(), self.options.tune),
                len(self.loop.hidden),
                self.options.tune,
                group_generator(self.seed, ["tune", *linears]),
                lambda: clear_input_caches(linears.values()),
            )
        self.layer_traces = {layer.prefix.removesuffix("."): {"tune": trace}}
        layer.layer.requires_grad_(False)
        changed: dict[str, Tensor] = {}
        for result, specs in self._results:
            for name, before in result.tensors.items():
                after = linears[name].stored()
                quantized = BWLALinear.from_stored(name, specs[name], {**before, **after}, linears[name].bias)
                layer.replace(name, quantized)
                changed |= {f"{name}.{key}": tensor for key, tensor in after.items() if stores(name, key)}
        for name, parameter in norms.items():
            full_name = f"{layer.prefix}{name}"
            dtype = entries[full_name].dtype
            changed[full_name] = parameter.detach().to(dtype, copy=True)
            parameter.data.copy_(changed[full_name])  # rounded to the stored dtype
        return changed

    def quantize_head(self, weight: Tensor, spec: LayerSpec) -> GroupResult:
        """Quantize the head W [V, K] in binary planes, once all layers are quantized."""
        return head_of_samples(self.loop, self.fitted_norm(), weight, spec, self.seed, self.options.fast)

    @staticmethod
    def memory_estimates(workload: Workload) -> Iterator[MemoryEstimate]:
        """Yield the memory of `fast`'s steps, of the tuning of each layer, and of distillation."""
        yield MemoryEstimate(_distillation_bytes(workload), "distillation")
        yield from FastRecipe.memory_estimates(workload)
        for layer in workload.distinct_layers():
            num_bytes = layer.stored_bytes + _tuning_bytes(layer, workload) + WORKSPACE_BYTES
            yield MemoryEstimate(num_bytes, f"layer {layer.index}, tuning")

    @staticmethod
    def compute_estimate(workload: Workload) -> ComputeEstimate:
        """Estimate `fast`'s work, the tuning of all layers, and distillation."""
        options, tokens = BestOptions(), workload.tokens
        tuning = options.tune.epochs if workload.tune_epochs is None else workload.tune_epochs
        distillation = options.distill.epochs if workload.distill_epochs is None else workload.distill_epochs
        if distillation:
            distillation += _EVALUATION_EPOCHS
        vocab_size, _ = workload.source.entries[workload.source.embedding_weight].shape
        widths = sum(group.rows + 2 * group.columns for group in workload.groups())
        elements = 30 * widths * (tuning + distillation) + 40 * vocab_size * distillation
        flops = 16 * tokens * workload.weights * (tuning + distillation)
        samples = workload.calibration.num_samples if workload.calibration else 0
        steps = samples * (tuning / options.tune.batch + distillation / options.distill.batch)
        moved = FLOAT_BYTES * tokens * elements + steps * sum(map(_level_bytes_moved, workload.groups()))
        training = ComputeEstimate(bytes_moved=moved, fast_flops=flops)
        return FastRecipe.compute_estimate(workload) + training


_EVALUATION_EPOCHS = 1
"""What evaluating the divergence before and after distillation costs, in epochs."""

_LEVEL_COPIES = 6
"""Float32 copies of a linear's weights that the levels of several planes and their gradients need at a time."""


def _level_bytes_moved(group: GroupShape) -> float:
    """Return the bytes that a training step moves for the levels of a group's weights and their gradients."""
    thresholds = 2 ** (group.planes - 1) - 1
    return group.weights * (110 + 45 * thresholds) if thresholds else 0.0


def _tuning_bytes(layer: LayerShape, workload: Workload) -> float:
    """Return the memory of tuning a layer.

    Counted are the original layer, the latent weights with gradients and Adam's two moments, and the activations that
    the backward pass needs; of several planes also the dequantized weights in half precision, and what computes the
    levels and gradients of the largest group.
    """
    tokens = workload.batch_tokens(SAMPLES_PER_BATCH)
    activations = sum(group.rows + 4 * group.columns for _, group in layer.groups)
    planes = [group.weights for _, group in layer.groups if group.planes > 1]
    dequantized = sum(planes) // 2 + _LEVEL_COPIES * max(planes, default=0)
    return float(FLOAT_BYTES * (6 * layer.weights + dequantized + tokens * 2 * activations))


def _distillation_bytes(workload: Workload) -> float:
    """Return the memory of distillation.

    Counted are the whole model with the signs of every plane in int8, the embedding and both heads in float32, one
    stage's latent weights with gradients and Adam's two moments, the activations of a batch that the backward pass
    needs (for several planes, inputs in half precision among them), and six copies of the logits that are computed at a
    time. With several planes, a stage's weights are also held dequantized in half precision.
    """
    tokens = workload.batch_tokens(DISTILLATION.batch)
    stage_weights = max(stage.weights for stage in make_stages(workload.source))
    vocab_size, hidden_size = workload.source.entries[workload.source.embedding_weight].shape
    several = [spec for spec in workload.specs.values() if spec.planes > 1]
    activations = sum(spec.out_features + 2 * spec.in_features for spec in workload.specs.values())
    activations += sum(spec.in_features for spec in several) // 2
    trained = 3 * vocab_size * hidden_size + 4 * stage_weights
    if several:
        trained += stage_weights // 2 + _LEVEL_COPIES * max(map(num_weights, several))
    signs = sum(spec.planes * num_weights(spec) for spec in workload.specs.values())
    logits = 6 * chunk_logits(workload.device)
    return float(signs + FLOAT_BYTES * (trained + tokens * activations + logits))

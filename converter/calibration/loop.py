"""The loop of the calibrated recipes: samples run through the original and the quantized model, layer by layer.

The quantized model's layers get the hidden states that the layers quantized before them produce, so that each input
group is quantized for the inputs that it will have.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from bwla_converter.calibration.activations import Activations, ActivationStore, StoredStates
from bwla_converter.calibration.layer_runner import DecoderLayer, LayerRunner
from bwla_converter.calibration.stepwise import SAMPLES_PER_BATCH, StepwiseLayer, find_output_projections
from bwla_converter.calibration.text import calibration_samples
from bwla_converter.common.tensors import SAMPLE_ELEMENTS, sample_rows
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.options import Calibration
from bwla_converter.quantize.final_norm import fit_norm
from bwla_converter.quantize.group import GroupResult, pool_rows
from bwla_converter.quantize.moments import Moments
from bwla_converter.source.model import Source
from bwla_converter.source.names import FINAL_NORM
from bwla_kernels.format import LayerSpec
from bwla_kernels.precision import fast_products
from torch import Tensor

QuantizeGroup = Callable[[Mapping[str, Tensor], Mapping[str, LayerSpec], Moments, Tensor], GroupResult]
"""Quantizes an input group: (weights, specs, moments of its inputs, some of the inputs [M, K]) -> result."""


def clipped_specs(specs: Mapping[str, LayerSpec], clip: float | None) -> dict[str, LayerSpec]:
    """Return `specs` with the given clipping ratio; None leaves them as they are."""
    return {name: spec if clip is None else replace(spec, clip=clip) for name, spec in specs.items()}


class CalibrationLoop:
    """Run calibration samples through the original and the quantized decoder layers side by side.

    A recipe calls `begin_layer`, `quantize` for each input group and `end_layer`, for each layer in order.

    Args:
        source: the original model.
        calibration: which text to use, and how much of it.
        seed: seed of the choice of samples.
        quantize_group: quantizes an input group; called in process 0 only, so that all processes get the same tensors.
        store: where the hidden states are kept; None for in memory.
        follow_stream: whether the outputs that are added to the residual stream also compensate its error.

    Attributes:
        ids: token ids of this process's samples [S, T].
        description: what the report and the checkpoint record about the calibration data.
        runner: builds the original model's layers.
        original_hidden, hidden: hidden states [S, T, hidden] of the original and of the quantized model before the
            current layer.
    """

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        seed: int,
        quantize_group: QuantizeGroup,
        store: ActivationStore | None = None,
        follow_stream: bool = True,
    ) -> None:
        ids, digest = calibration_samples(calibration, source.folder, seed)
        self.description: dict[str, object] = {
            "source": Path(calibration.source).name,
            "sha256": digest,
            "samples": calibration.num_samples,
            "length": calibration.max_seq_length,
        }
        self.store = store or ActivationStore()
        self.ids = ids[self.store.processes.samples_of(len(ids))]
        self.runner = LayerRunner(source, self.store.device)
        self.hidden = self.original_hidden = self.store.empty()
        self._quantize_group, self._follow_stream = quantize_group, follow_stream
        self._current: tuple[StepwiseLayer, StepwiseLayer] | None = None

    @property
    def current(self) -> tuple[StepwiseLayer, StepwiseLayer]:
        """The current decoder layer with its hidden states, of the original and of the quantized model."""
        assert self._current is not None
        return self._current

    @property
    def layers(self) -> tuple[DecoderLayer, DecoderLayer]:
        """The current decoder layer: the original, and the one whose linears are replaced by quantized ones."""
        original, quantized = self.current
        return original.layer, quantized.layer

    @torch.no_grad()
    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Build decoder layer `index` twice from its stored tensors; layer 0 starts from the embeddings."""
        if index == 0:
            parts = map(self.runner.embed, self.ids.split(SAMPLES_PER_BATCH))
            shape = torch.Size((*self.ids.shape, self.runner.config.hidden_size))
            self.hidden = self.original_hidden = self.store.keep(shape, parts)
        names = [members[0] for _, members in self.runner.source.groups_of_layer(index)]
        original, quantized = (self.runner.layer(index, tensors) for _ in range(2))
        projections = find_output_projections(original, names, self.original_hidden)
        self._current = (
            StepwiseLayer(original, self.original_hidden, self.store, projections),
            StepwiseLayer(quantized, self.hidden, self.store, projections),
        )

    @torch.no_grad()
    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Quantize an input group and put its quantized linears into the quantized layer."""
        moments, inputs = self.collect_moments(weights)
        processes = self.store.processes
        own = self._quantize_group(weights, specs, moments, inputs) if processes.process_rank == 0 else None
        result = replace(processes.broadcast_group(own, specs, self.store.device), inputs=inputs)
        specs = clipped_specs(specs, result.clip)
        _, quantized = self.layers
        for name, tensors in result.tensors.items():
            bias = getattr(quantized.linear(name), "bias", None)
            quantized.replace(name, BWLALinear.from_stored(name, specs[name], tensors, bias))
        return result

    @torch.no_grad()
    def collect_moments(self, weights: Mapping[str, Tensor]) -> tuple[Moments, Tensor]:
        """Run the samples up to the linears of an input group.

        Args:
            weights: full name of each linear -> its original weight [N_i, K].

        Returns: the moments of its inputs over all processes, and some of this process's inputs [M, K].
        """
        original, quantized = self.current
        name, first = next(iter(weights.items()))
        width = first.shape[1]
        limit = SAMPLE_ELEMENTS * SAMPLES_PER_BATCH // len(self.hidden)
        reader = self.runner.source.family.group_of(name).stream if self._follow_stream else None
        moments = Moments.zeros(width, self.store.device, cross_gram=reader is None)
        pooled = None if reader is None else pool_rows(weights.values())
        sampled = []
        with fast_products(self.store.device):
            batches = zip(quantized.inputs_of(name, reader), original.inputs_of(name, reader), strict=True)
            for (inputs, stream_hat), (original_inputs, stream) in batches:
                moments.add(inputs, original_inputs)
                if pooled is not None and stream is not None and stream_hat is not None:
                    error = (original_inputs.float() - inputs.float()) @ pooled.mT
                    moments.add_error(inputs, error + stream - stream_hat)
                sampled.append(sample_rows(inputs.reshape(-1, width), limit).clone())
        self.store.processes.sum_moments(moments)
        return moments, torch.cat(sampled)

    @torch.no_grad()
    def advance_original(self) -> None:
        """Replace the original model's hidden states by the outputs of its current layer."""
        original, _ = self.current
        with fast_products(self.store.device):
            self.original_hidden = original.outputs()
        original.hidden = self.store.empty()

    @torch.no_grad()
    def quantized_outputs(self) -> Activations:
        """Return the outputs of the current quantized layer."""
        _, quantized = self.current
        with fast_products(self.store.device):
            return quantized.outputs()

    def advance_quantized(self, outputs: Activations) -> None:
        """Replace the quantized model's hidden states by `outputs`, and release the current layer."""
        self.hidden = outputs
        self._current = None

    def end_layer(self) -> None:
        """Replace the hidden states of both models by the outputs of the current layer, and release it."""
        self.advance_original()
        self.advance_quantized(self.quantized_outputs())

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """Return the hidden states of both models before the next layer."""
        return {"original_hidden": self.original_hidden.stored(), "hidden": self.hidden.stored()}

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Continue from a `state` of an earlier session."""
        self.original_hidden = self.store.take(state.get("original_hidden"))
        self.hidden = self.store.take(state.get("hidden"))

    def fit_final_norm(self) -> dict[str, Tensor]:
        """Fit the final norm to the hidden states after the last layer; return its weight by its full name.

        With several processes, each uses its own samples only.
        """
        pairs = zip(
            self.original_hidden.split(SAMPLES_PER_BATCH), self.hidden.split(SAMPLES_PER_BATCH), strict=True
        )
        name = f"{FINAL_NORM}.weight"
        weight = fit_norm(self.runner.final_norm(), pairs)
        return {name: weight.to("cpu", self.runner.source.entries[name].dtype)}

"""The loop of the calibrated recipes: samples run through the original and the quantized model, layer by layer.

The quantized model's layers get the hidden states that the layers quantized before them produce, so that each input
group is quantized for the inputs that it will have. A recipe that does not compare with the original model runs the
quantized one alone.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from bwla_converter.calibration.activations import Activations, ActivationStore, StoredStates
from bwla_converter.calibration.expert_inputs import collect_expert_moments, is_down
from bwla_converter.calibration.layer_runner import DecoderLayer, LayerRunner
from bwla_converter.calibration.samples import Samples
from bwla_converter.calibration.stepwise import SAMPLES_PER_BATCH, StepwiseLayer, find_output_projections
from bwla_converter.calibration.text import calibration_samples
from bwla_converter.common.tensors import SAMPLE_ELEMENTS, sample_rows
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.options import Calibration
from bwla_converter.quantize.final_norm import fit_norm
from bwla_converter.quantize.group import GroupResult, pool_rows
from bwla_converter.quantize.moments import Moments
from bwla_converter.source.model import Source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import LayerSpec
from bwla_kernels.precision import fast_products
from torch import Tensor

log = logging.getLogger(__name__)

QuantizeGroup = Callable[[Mapping[str, Tensor], Mapping[str, LayerSpec], Moments, Tensor], GroupResult]
"""Quantizes an input group: (weights, specs, moments of its inputs, some of the inputs [M, K]) -> result."""

Inputs = tuple[Tensor, Tensor | None]
OriginalInputs = tuple[Tensor | None, Tensor | None]


def clipped_specs(specs: Mapping[str, LayerSpec], clip: float | None) -> dict[str, LayerSpec]:
    """Return `specs` with the given clipping ratio; None leaves them as they are."""
    return {name: spec if clip is None else replace(spec, clip=clip) for name, spec in specs.items()}


class CalibrationLoop:
    """Run calibration samples through the quantized decoder layers, and the original ones beside them.

    A recipe calls `begin_layer`, `quantize` for each input group and `end_layer`, for each layer in order.

    Args:
        source: the original model.
        calibration: which text to use, and how much of it.
        seed: seed of the choice of samples.
        quantize_group: quantizes an input group; called in process 0 only, so that all processes get the same tensors.
        store: where the hidden states are kept; None for in memory.
        follow_stream: whether the outputs that are added to the residual stream also compensate its error.
        run_original: whether the samples run through the original layers too. Otherwise the moments say nothing about
            the original model, and `original_samples` stays empty.

    Attributes:
        ids: token ids of this process's samples [S, T].
        description: what the report and the checkpoint record about the calibration data.
        runner: builds the original model's layers.
        original_samples, samples: the samples in the original and in the quantized model before the current layer.
    """

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        seed: int,
        quantize_group: QuantizeGroup,
        store: ActivationStore | None = None,
        follow_stream: bool = True,
        run_original: bool = True,
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
        self.samples = self.original_samples = self._no_samples()
        if self.store.processes.world_size > 1 and self.runner.outer.conventions.shares:
            raise BWLAError(
                "--gpus: expected decoder layers that pass on hidden states alone, found layers that share keys and "
                "values with later ones, which the processes do not exchange: use --gpus 1"
            )
        self.quantize_group, self._follow_stream = quantize_group, follow_stream
        self._run_original = run_original
        self._original: StepwiseLayer | None = None
        self._quantized: StepwiseLayer | None = None

    @property
    def hidden(self) -> Activations:
        """Hidden states [S, T, hidden] of the quantized model before the current layer."""
        return self.samples.hidden

    @property
    def original_hidden(self) -> Activations:
        """Hidden states [S, T, hidden] of the original model before the current layer."""
        return self.original_samples.hidden

    def _no_samples(self) -> Samples:
        return Samples(self.store.empty(), self.ids[:0])

    @property
    def quantized(self) -> StepwiseLayer:
        """The current decoder layer of the quantized model with its hidden states; linears are replaced in it."""
        assert self._quantized is not None
        return self._quantized

    @property
    def layers(self) -> tuple[DecoderLayer, DecoderLayer]:
        """The current decoder layer: the original, and the one whose linears are replaced by quantized ones."""
        assert self._original is not None
        return self._original.layer, self.quantized.layer

    @torch.no_grad()
    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Build decoder layer `index` of each model from its stored tensors; layer 0 starts from the embeddings."""
        if index == 0:
            self.samples = Samples.embedded(self.runner, self.store, self.ids, SAMPLES_PER_BATCH)
            if self._run_original:
                self.original_samples = self.samples
        names = [members[0] for _, members in self.runner.source.groups_of_layer(index)]
        layer = self.runner.layer(index, tensors)
        projections = find_output_projections(layer, names, self.samples)
        self._quantized = StepwiseLayer(layer, self.samples, self.store, projections)
        if self._run_original:
            original = self.runner.layer(index, tensors)
            self._original = StepwiseLayer(original, self.original_samples, self.store, projections)

    @torch.no_grad()
    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Quantize an input group and put its quantized linears into the quantized layer."""
        moments, inputs = self.collect_moments(weights)
        processes = self.store.processes
        own = self.quantize_group(weights, specs, moments, inputs) if processes.process_rank == 0 else None
        result = replace(
            processes.broadcast_group(own, specs, self.store.device), inputs=inputs, starved=moments.starved
        )
        specs = clipped_specs(specs, result.clip)
        quantized = self.quantized.layer
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
        name, first = next(iter(weights.items()))
        width = first.shape[1]
        if is_down(self.quantized.layer, name):
            original = self._original if self._run_original else None
            return collect_expert_moments(weights, self.quantized, original, self.store)
        limit = SAMPLE_ELEMENTS * SAMPLES_PER_BATCH // len(self.samples)
        follow = self._follow_stream and self._run_original
        reader = self.runner.source.structure.group_of(name).stream if follow else None
        cross_gram = reader is None and self._run_original
        moments = Moments.zeros(width, self.store.device, cross_gram)
        pooled = None if reader is None else pool_rows(weights.values())
        sampled = []
        with fast_products(self.store.device):
            for (inputs, stream_hat), (original_inputs, stream) in self._inputs_of(name, reader):
                moments.add(inputs, original_inputs)
                if pooled is not None and stream is not None and stream_hat is not None:
                    assert original_inputs is not None
                    error = (original_inputs.float() - inputs.float()) @ pooled.mT
                    # The linear may read all tokens in one row.
                    wanted, found = stream.reshape(error.shape), stream_hat.reshape(error.shape)
                    moments.add_error(inputs, error + wanted - found)
                sampled.append(sample_rows(inputs.reshape(-1, width), limit).clone())
        self.store.processes.sum_moments(moments)
        return moments, torch.cat(sampled)

    def _inputs_of(self, name: str, reader: str | None) -> Iterator[tuple[Inputs, OriginalInputs]]:
        """Yield, for each batch of samples, `StepwiseLayer.inputs_of` of the quantized and of the original layer."""
        quantized = self.quantized.inputs_of(name, reader)
        if self._original is not None:
            yield from zip(quantized, self._original.inputs_of(name, reader), strict=True)
        else:
            yield from ((inputs, (None, None)) for inputs in quantized)

    @torch.no_grad()
    def advance_original(self) -> None:
        """Run the original model's samples through its current layer."""
        assert self._original is not None
        with fast_products(self.store.device):
            self.original_samples = self._original.outputs()
        self._original.samples = self._no_samples()

    @torch.no_grad()
    def quantized_outputs(self) -> Samples:
        """Return the samples after the current quantized layer."""
        with fast_products(self.store.device):
            return self.quantized.outputs()

    def advance_quantized(self, outputs: Samples) -> None:
        """Replace the quantized model's samples by `outputs`, and release the current layer."""
        self.samples = outputs
        self._original = self._quantized = None

    def end_layer(self) -> None:
        """Replace the hidden states by the outputs of the current layer, and release it."""
        if self._run_original:
            self.advance_original()
        self.advance_quantized(self.quantized_outputs())

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """Return the hidden states before the next layer."""
        original = self.original_samples.stored("original_hidden") if self._run_original else {}
        return {**original, **self.samples.stored("hidden")}

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Continue from a `state` of an earlier session."""
        if self._run_original:
            self.original_samples = Samples.take(state, "original_hidden", self.store, self.ids)
        self.samples = Samples.take(state, "hidden", self.store, self.ids)

    def fit_final_norm(self) -> dict[str, Tensor]:
        """Fit the final norm to the hidden states after the last layer; return its weight by its full name.

        Returns nothing where the model has no norm whose output is all that the head reads. With several processes,
        each uses its own samples only.
        """
        outer, name = self.runner.outer, f"{self.runner.source.structure.final_norm}.weight"
        norm = outer.final_norm()
        probe = next(self.hidden.split(1))
        if norm is None or name not in self.runner.source.entries or outer.norm_inputs(probe) is None:
            log.info("the final norm is left as it is: the head of this model does not read its output alone")
            return {}

        def inputs_of(hidden: Activations) -> Iterator[Tensor]:
            for part in hidden.split(SAMPLES_PER_BATCH):
                inputs = outer.norm_inputs(part)
                assert inputs is not None
                yield inputs

        pairs = zip(inputs_of(self.original_hidden), inputs_of(self.hidden), strict=True)
        weight = fit_norm(norm, pairs)
        outer.release()
        return {name: weight.to("cpu", self.runner.source.entries[name].dtype)}

    @torch.no_grad()
    def collect_head_moments(self, final_norm: Mapping[str, Tensor]) -> tuple[Moments, Tensor]:
        """Run the samples of the quantized model from the last layer up to the head.

        Args:
            final_norm: the weight of the fitted final norm by its full name; empty where it is left as it is.

        Returns: the moments of the head's inputs, of this process's samples, and some of the inputs [M, K].
        """
        outer = self.runner.outer
        norm = outer.final_norm()
        for weight in final_norm.values():
            assert norm is not None
            norm.get_parameter("weight").copy_(weight)
        limit = SAMPLE_ELEMENTS * SAMPLES_PER_BATCH // len(self.samples)
        moments: Moments | None = None
        sampled = []
        with fast_products(self.store.device):
            for part in self.hidden.split(SAMPLES_PER_BATCH):
                inputs = outer.normed(part)
                moments = moments or Moments.zeros(inputs.shape[-1], self.store.device, cross_gram=False)
                moments.add(inputs)
                sampled.append(sample_rows(inputs.flatten(0, -2), limit).clone())
        outer.release()
        assert moments is not None
        return moments, torch.cat(sampled)

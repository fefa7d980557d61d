"""Recipe `fast` as the pipeline sees it: calibration text runs through the model, block by block."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from bwla_converter.calibration.activations import Activations, ActivationStore, StoredStates
from bwla_converter.calibration.layer_runner import DecoderLayer, LayerRunner
from bwla_converter.calibration.text import calibration_samples
from bwla_converter.common.tensors import SAMPLE_ELEMENTS, sample_rows
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.options import Calibration
from bwla_converter.quantize import fast
from bwla_converter.quantize.final_norm import fit_norm
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_converter.source.model import Source
from bwla_converter.source.names import FINAL_NORM
from bwla_kernels.format import LayerSpec
from torch import Tensor

WINDOWS_AT_ONCE = 4


def clipped(specs: Mapping[str, LayerSpec], clip: float | None) -> dict[str, LayerSpec]:
    """`specs` with the clip that was chosen, if one was."""
    return {name: spec if clip is None else replace(spec, clip=clip) for name, spec in specs.items()}


class FastRecipe:
    """`fast`: calibration text is carried through the original and the quantized blocks side by side.

    Args:
        source: the model.
        calibration: the text.
        seed: of the windows and of everything random.
        options: of the groups.
        store: keeps the hidden states; None for memory.
    """

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        seed: int,
        options: fast.FastOptions | None = None,
        store: ActivationStore | None = None,
    ) -> None:
        self.seed, self.options = seed, options or fast.FastOptions()
        self.ids, digest = calibration_samples(calibration, source.folder, seed)
        self.calibration: dict[str, object] = {
            "source": Path(calibration.source).name,
            "sha256": digest,
            "samples": calibration.num_samples,
            "length": calibration.max_seq_length,
        }
        self.store = store or ActivationStore()
        self.ids = self.ids[self.store.processes.samples_of(len(self.ids))]
        self.runner = LayerRunner(source, self.store.device)
        self.hidden = self.original_hidden = self.store.empty()
        self.layer_traces: dict[str, dict[str, list[float]]] = {}
        self._blocks: tuple[DecoderLayer, DecoderLayer] | None = None

    @property
    def blocks(self) -> tuple[DecoderLayer, DecoderLayer]:
        """The current block as it was, and as it is quantized so far."""
        assert self._blocks is not None
        return self._blocks

    @torch.no_grad()
    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Build the block twice; the first one begins with the text's embeddings."""
        if index == 0:
            parts = map(self.runner.embed, self.ids.split(WINDOWS_AT_ONCE))
            shape = torch.Size((*self.ids.shape, self.runner.config.hidden_size))
            self.hidden = self.original_hidden = self.store.keep(shape, parts)
        self._blocks = (self.runner.layer(index, tensors), self.runner.layer(index, tensors))

    @torch.no_grad()
    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """In the metric of the group's inputs; the quantized linears take their places in the block."""
        moments, inputs = self._moments(next(iter(weights)), next(iter(specs.values())).in_features)
        # One rank decides, so that all go on with the same tensors.
        own = self.group(weights, specs, moments, inputs) if self.store.processes.process_rank == 0 else None
        shared = self.store.processes.broadcast_group(own, specs, self.store.device)
        result = replace(shared, inputs=inputs)
        specs = clipped(specs, result.clip)
        for name, tensors in result.tensors.items():
            _, quantized = self.blocks
            bias = getattr(quantized.linear(name), "bias", None)
            quantized.replace(name, BWLALinear.from_stored(name, specs[name], tensors, bias))
        return result

    def group(
        self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        """What is made of an input group; the rest of the recipe does not care how."""
        return fast.quantize_group(
            weights, specs, moments, inputs=inputs, seed=self.seed, options=self.options
        )

    @torch.no_grad()
    def end_layer(self) -> Mapping[str, Tensor]:
        """Carry the text through both."""
        original, quantized = self.blocks
        self.original_hidden = self._through(original, self.original_hidden)
        self.hidden = self._through(quantized, self.hidden)
        self._blocks = None
        return {}

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """The text as both models have it after the blocks so far."""
        return {"original_hidden": self.original_hidden.stored(), "hidden": self.hidden.stored()}

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Take up the text where it was."""
        self.original_hidden = self.store.take(state.get("original_hidden"))
        self.hidden = self.store.take(state.get("hidden"))

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """The last norm, fitted to what the blocks have become."""
        return self.fitted_norm()

    def fitted_norm(self) -> dict[str, Tensor]:
        """The last norm's weight by its full name, see `final_norm`; of several processes each looks at its own windows."""
        if not self.options.final_norm:
            return {}
        pairs = zip(
            self.original_hidden.split(WINDOWS_AT_ONCE), self.hidden.split(WINDOWS_AT_ONCE), strict=True
        )
        name = f"{FINAL_NORM}.weight"
        weight = fit_norm(self.runner.final_norm(), pairs)
        return {name: weight.to("cpu", self.runner.source.entries[name].dtype)}

    def _moments(self, name: str, width: int) -> tuple[Moments, Tensor]:
        """Of the inputs of the linear called `name`, and some of these inputs [M, width] for the report."""
        original, quantized = self.blocks
        moments = Moments.zeros(width, self.store.device, cross_gram=True)
        pairs = zip(
            self.hidden.split(WINDOWS_AT_ONCE), self.original_hidden.split(WINDOWS_AT_ONCE), strict=True
        )
        limit, seen = SAMPLE_ELEMENTS * WINDOWS_AT_ONCE // len(self.hidden), []
        reader = self.runner.source.family.group_of(name).stream if self.options.compensate_residual_stream else None
        for here, there in pairs:
            inputs, stream_hat = quantized.inputs_and_stream(name, reader, here)
            wanted, stream = original.inputs_and_stream(name, reader, there)
            moments.add(inputs, wanted)
            if stream is not None and stream_hat is not None:
                moments.add_residual(inputs, stream_hat, stream)
            seen.append(sample_rows(inputs.reshape(-1, width), limit).clone())
        self.store.processes.sum_moments(moments)
        return moments, torch.cat(seen)

    def _through(self, block: DecoderLayer, hidden: Activations) -> Activations:
        return hidden.map(block.run, WINDOWS_AT_ONCE)

"""Recipe `best`: `fast`, then each block tuned by gradients, then the scales of the whole model distilled."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from bwla_converter.activations import ActivationStore
from bwla_converter.calibrated import FastRecipe, clipped
from bwla_converter.calibration import Calibration
from bwla_converter.distill import DISTILLATION, distill
from bwla_converter.fast import FastOptions
from bwla_converter.group import GroupResult, group_generator
from bwla_converter.hf import BWLALinear
from bwla_converter.shell import Block
from bwla_converter.source import Source
from bwla_converter.tunable import TunableLinear, forget_inputs, trainable_norms, tunable_group
from bwla_converter.tune import TuneOptions, parameter_groups, tune
from bwla_kernels.format import LayerSpec
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class BestOptions:
    """What the recipe leaves open: of its groups, of each block's tuning, of the whole model's distillation."""

    fast: FastOptions = field(default_factory=FastOptions)
    tune: TuneOptions = field(default_factory=TuneOptions)
    distill: TuneOptions = DISTILLATION


def relative_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ||found - wanted||^2 / ||wanted||^2, for hidden states [..., hidden].

    Each token counts in units of itself, as it does for the norms that read it: without that, the few tokens whose
    hidden states are hundreds of times larger than all others decide alone.
    """
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()


class BestRecipe(FastRecipe):
    """`best`. Arguments as `FastRecipe`."""

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        seed: int,
        options: BestOptions | None = None,
        store: ActivationStore | None = None,
    ) -> None:
        self.best = options or BestOptions()
        super().__init__(
            source, calibration, seed, replace(self.best.fast, latents=self.best.tune.epochs > 0), store
        )
        self._results: list[tuple[GroupResult, Mapping[str, LayerSpec]]] = []
        self._index = 0
        self.traces: dict[str, list[float]] = {}

    def begin_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Build the block twice."""
        self._index, self._results = index, []
        super().begin_block(index, tensors)

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """As `fast`; the result waits for the block's tuning."""
        result = super().quantize(weights, specs)
        self._results.append((result, clipped(specs, result.clip)))
        return result

    def end_block(self) -> Mapping[str, Tensor]:
        """Tune the block, then carry the text through both."""
        original, quantized = self.blocks
        with torch.no_grad():
            self.original_hidden = self._through(original, self.original_hidden)
        changed = self._tune(quantized) if self.best.tune.epochs else {}
        with torch.no_grad():
            self.hidden = self._through(quantized, self.hidden)
        self._blocks, self._results = None, []
        return changed

    def _tune(self, block: Block) -> dict[str, Tensor]:
        """Tune the quantized block on the text; what is stored takes the tuned linears' places again."""
        linears: dict[str, TunableLinear] = {}
        for result, specs in self._results:
            linears |= tunable_group(block, result.tensors, specs, result.latents)
        norms = trainable_norms(block.layer)

        def loss_of(indices: Tensor) -> Tensor:
            return relative_loss(block.run(self.hidden[indices]), self.original_hidden[indices])

        self.traces[f"tune block {self._index}"] = tune(
            loss_of,
            parameter_groups(linears.values(), norms.values(), self.best.tune),
            len(self.hidden),
            self.best.tune,
            group_generator(self.seed, ["tune", *linears]),
            lambda: forget_inputs(linears.values()),
        )
        block.model.requires_grad_(False)
        changed: dict[str, Tensor] = {}
        for result, specs in self._results:
            for name, before in result.tensors.items():
                after = linears[name].stored()
                quantized = BWLALinear.from_stored(name, specs[name], {**before, **after}, linears[name].bias)
                block.replace(name, quantized)
                changed |= {f"{name}.{key}": tensor for key, tensor in after.items()}
        for name, parameter in norms.items():
            full = f"{block.prefix}{name}"
            changed[full] = parameter.detach().to(self.shell.source.entries[full].dtype, copy=True)
            parameter.data.copy_(changed[full])  # as it is stored
        return changed

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Distil the logits over the whole model."""
        if not self.best.distill.epochs:
            return {}
        return self.distill(AutoModelForCausalLM.from_pretrained(folder, dtype=self.shell.dtype))

    def distill(self, model: PreTrainedModel) -> Mapping[str, Tensor]:
        """The stored tensors of a whole quantized model that distillation changed; `model` is used up."""
        changed, trace = distill(
            model, self.shell, self.ids, self.original_hidden, self.best.distill, self.seed
        )
        self.traces["distill"] = trace
        return changed

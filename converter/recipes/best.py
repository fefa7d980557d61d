"""Recipe `best`: `fast`, then each block tuned by gradients, then the scales of the whole model distilled."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from bwla_converter.calibration.activations import Activations, ActivationStore
from bwla_converter.calibration.layer_runner import DecoderLayer
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.options import Calibration
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.quantize.group import GroupResult, group_generator
from bwla_converter.recipes.fast import FastRecipe, clipped
from bwla_converter.source.model import Source
from bwla_converter.training.distill import DISTILLATION, distill
from bwla_converter.training.optimize import TuneOptions, parameter_groups, tune
from bwla_converter.training.ste_linear import STELinear, forget_inputs, norm_weights, ste_group
from bwla_kernels.format import LayerSpec
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

log = logging.getLogger(__name__)


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


NOT_BETTER = (
    "%s: tuning did not bring it closer to the original, what recipe fast found stays; try more "
    "--num-calibration-samples"
)


@dataclass(frozen=True)
class Kept:
    """A block's linears and norms, to be put back."""

    linears: dict[str, nn.Module]
    norms: dict[str, Tensor]

    @classmethod
    def of(cls, block: DecoderLayer, names: Iterable[str]) -> "Kept":
        """What the block has now, its linears by their full names."""
        norms = {name: value.clone() for name, value in norm_weights(block.layer).items()}
        return cls({name: block.linear(name) for name in names}, norms)

    def put_back(self, block: DecoderLayer) -> None:
        """Give it back to the block."""
        for name, linear in self.linears.items():
            block.replace(name, linear)
        for name, parameter in norm_weights(block.layer).items():
            parameter.data.copy_(self.norms[name])


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
            source, calibration, seed, replace(self.best.fast, keep_latents=self.best.tune.epochs > 0), store
        )
        self._results: list[tuple[GroupResult, Mapping[str, LayerSpec]]] = []
        self._index = 0
        self.divergence: list[float] = []

    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Build the block twice."""
        self._index, self._results = index, []
        super().begin_layer(index, tensors)

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """As `fast`; the result waits for the block's tuning."""
        result = super().quantize(weights, specs)
        self._results.append((result, clipped(specs, result.clip)))
        return result

    def end_layer(self) -> Mapping[str, Tensor]:
        """Tune the block, then carry the text through both."""
        original, quantized = self.blocks
        with torch.no_grad():
            self.original_hidden = self._through(original, self.original_hidden)
            untuned = self._through(quantized, self.hidden)
        changed: dict[str, Tensor] = {}
        if self.best.tune.epochs:
            before = self._loss(untuned)
            kept = Kept.of(quantized, [name for result, _ in self._results for name in result.tensors])
            changed = self._tune(quantized)
            with torch.no_grad():
                tuned = self._through(quantized, self.hidden)
            if self._loss(tuned) < before:
                untuned = tuned
            else:
                log.warning(NOT_BETTER, f"block {self._index}")
                kept.put_back(quantized)
                changed = {}
        self.hidden = untuned
        self._blocks, self._results = None, []
        return changed

    def _loss(self, hidden: Activations) -> float:
        """What the block's tuning lowers, over all of the text."""
        parts = zip(hidden.split(1), self.original_hidden.split(1), strict=True)
        return sum(float(relative_loss(found, wanted)) for found, wanted in parts) / len(hidden)

    def _tune(self, block: DecoderLayer) -> dict[str, Tensor]:
        """Tune the quantized block on the text; what is stored takes the tuned linears' places again."""
        linears: dict[str, STELinear] = {}
        for result, specs in self._results:
            linears |= ste_group(block, result.tensors, specs, result.latents)
        norms = norm_weights(block.layer)
        for parameter in norms.values():
            parameter.requires_grad_(True)

        def loss_of(indices: Tensor) -> Tensor:
            return relative_loss(block.run(self.hidden[indices]), self.original_hidden[indices])

        trace = tune(
            loss_of,
            parameter_groups(linears.values(), norms.values(), self.best.tune),
            len(self.hidden),
            self.best.tune,
            group_generator(self.seed, ["tune", *linears]),
            lambda: forget_inputs(linears.values()),
        )
        self.layer_traces = {block.prefix.removesuffix("."): {"tune": trace}}
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
            changed[full] = parameter.detach().to(self.runner.source.entries[full].dtype, copy=True)
            parameter.data.copy_(changed[full])  # as it is stored
        return changed

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Fit the last norm, then distil the logits over the whole model."""
        if not self.best.distill.epochs:
            return self.fitted_norm()
        return self.distill(AutoModelForCausalLM.from_pretrained(folder, dtype=self.runner.dtype))

    def distill(self, model: PreTrainedModel) -> Mapping[str, Tensor]:
        """The stored tensors of a whole quantized model that distillation changed; `model` is used up."""
        changed, self.divergence = distill(
            model,
            self.runner,
            self.ids,
            self.original_hidden,
            self.best.distill,
            self.seed,
            self.fitted_norm(),
        )
        log.info(
            "distillation: divergence from the original %.4f -> %.4f nats",
            self.divergence[0],
            self.divergence[-1],
        )
        return changed

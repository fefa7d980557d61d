"""The recipes as the pipeline sees them: told of each block, asked for each group, in execution order."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from bwla_converter.calibration.activations import ActivationStore, StoredStates
from bwla_converter.options import Calibration, Options
from bwla_converter.quantize import paper
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.quantize.group import GroupResult
from bwla_converter.recipes.best import BestOptions, BestRecipe
from bwla_converter.recipes.fast import FastRecipe
from bwla_converter.source.model import Source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import LayerSpec
from torch import Tensor

RECIPES = ("paper", "fast", "best")


class Recipe(Protocol):
    """How to quantize a model, block by block."""

    calibration: dict[str, object]
    """What the report and the checkpoint say of the calibration data; empty without."""

    layer_traces: dict[str, dict[str, list[float]]]
    """Of the block that ended last: what was worked on -> name of an objective -> its values; for the report."""

    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """DecoderLayer `index` comes next; its stored tensors by their full names."""

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """One input group of the block."""

    def end_layer(self) -> Mapping[str, Tensor]:
        """All groups of the block were quantized; the stored tensors that changed since, by their full names."""

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """What the next block needs of those before it; `restore` with it goes on as if never interrupted."""

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Take up a `state`, in place of all blocks before."""

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """The checkpoint in `folder` is complete; the stored tensors to replace in it, by their full names."""


class PaperRecipe:
    """`paper`: from the weights alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calibration: dict[str, object] = {}
        self.layer_traces: dict[str, dict[str, list[float]]] = {}

    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to prepare."""

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """By OKT, PSP, signs and scales."""
        return paper.quantize_group(weights, specs, seed=self.seed)

    def end_layer(self) -> Mapping[str, Tensor]:
        """Nothing to carry on."""
        return {}

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Nothing to take up."""

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Nothing to change."""
        return {}


def make_recipe(options: Options, source: Source, store: ActivationStore | None = None) -> Recipe:
    """The recipe that was asked for.

    Args:
        options: of the conversion.
        source: the model.
        store: says where the recipe keeps the hidden states of the text, and its device.

    Raises:
        BWLAError: there is none of that name, or it needs calibration text and got none.
        SourceError: the text cannot be used.
    """
    check_recipe(options.recipe, options.calibration)
    if options.recipe == "paper":
        return PaperRecipe(options.seed)
    assert options.calibration is not None
    groups = FastOptions(choose_clip=options.clip is None)
    if options.recipe == "fast":
        return FastRecipe(source, options.calibration, options.seed, groups, store)
    best = best_options(options, groups, source.num_layers)
    return BestRecipe(source, options.calibration, options.seed, best, store)


def best_options(options: Options, groups: FastOptions, blocks: int) -> BestOptions:
    """What was asked of recipe `best`; what was not, as it is by default.

    Args:
        options: of the conversion; half of its minutes are for the blocks' tuning, half for distillation.
        groups: of the input groups.
        blocks: of the model.
    """
    best = BestOptions(fast=groups)
    tune, distill = best.tune, best.distill
    if options.tune_epochs is not None:
        tune = replace(tune, epochs=options.tune_epochs)
    if options.distill_epochs is not None:
        distill = replace(distill, epochs=options.distill_epochs)
    if options.minutes is not None:
        tune = replace(tune, minutes=options.minutes / 2 / blocks)
        distill = replace(distill, minutes=options.minutes / 2)
    return replace(best, tune=tune, distill=distill)


def check_recipe(name: str, calibration: Calibration | None) -> None:
    """What can be wrong with the choice itself, before the model is looked at.

    Raises:
        BWLAError: as `make_recipe`.
    """
    if name not in RECIPES:
        raise BWLAError(f"recipe {name!r} does not exist: the choice is {', '.join(RECIPES)}")
    if name != "paper" and calibration is None:
        raise BWLAError(f"recipe {name!r} needs text: give --calibration FILE, a folder, or wikitext2")

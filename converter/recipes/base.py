"""The interface between the pipeline and the recipes, and the choice of a recipe by its name."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Protocol

from bwla_converter.calibration.activations import ActivationStore, StoredStates
from bwla_converter.options import AUTO_RECIPE, HEAD_PLANES, Calibration, Options
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.paper import PaperOptions
from bwla_converter.recipes.best import BestOptions, BestRecipe
from bwla_converter.recipes.data_free import DataFreeRecipe
from bwla_converter.recipes.fast import FastRecipe
from bwla_converter.recipes.lossless import LosslessRecipe
from bwla_converter.recipes.paper import PaperRecipe
from bwla_converter.recipes.workload import ComputeEstimate, MemoryEstimate, Workload
from bwla_converter.source.model import Source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import LayerSpec
from torch import Tensor


class Recipe(Protocol):
    """A way to quantize a model, one decoder layer after the other.

    The pipeline calls `begin_layer`, `quantize` for each input group, and `end_layer`, for each layer in order, and
    `finish` at the end.
    """

    needs_calibration: ClassVar[bool]
    """Whether the recipe needs calibration data."""

    models: ClassVar[int]
    """How many models the calibration samples run through: the quantized one, and the original to compare with."""

    calibration: dict[str, object]
    """What the report and the checkpoint record about the calibration data; empty without."""

    layer_traces: dict[str, dict[str, list[float]]]
    """For the report, of the last layer: name of a module -> name of an objective -> its values over time."""

    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Prepare decoder layer `index`, given its stored tensors by their full names."""

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Quantize an input group of the layer."""

    def end_layer(self) -> Mapping[str, Tensor]:
        """Finish the layer; return the stored tensors that changed since, by their full names."""

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """Return what the next layer needs of those before it."""

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Continue from a `state` of an earlier session; the result is the same as without the interruption."""

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Return the tensors to replace in the complete checkpoint in `folder`, by their full names."""

    @staticmethod
    def memory_estimates(workload: Workload) -> Iterator[MemoryEstimate]:
        """Yield the memory of each step that may need the most."""

    @staticmethod
    def compute_estimate(workload: Workload) -> ComputeEstimate:
        """Estimate the work of the whole conversion."""


AnyRecipe = (
    type[DataFreeRecipe] | type[PaperRecipe] | type[FastRecipe] | type[BestRecipe] | type[LosslessRecipe]
)

RECIPES: Mapping[str, AnyRecipe] = {
    AUTO_RECIPE: FastRecipe,  # or less, see `planning.choose`
    "data-free": DataFreeRecipe,
    "paper": PaperRecipe,
    "fast": FastRecipe,
    "best": BestRecipe,
    "lossless": LosslessRecipe,
}


SEVERAL_PLANES = (AUTO_RECIPE, "fast", "best")
"""Recipes that choose the signs of several planes, which a head needs."""


def make_recipe(options: Options, source: Source, store: ActivationStore | None = None) -> Recipe:
    """Build the recipe that `options` name.

    Args:
        options: options of the conversion.
        source: the model.
        store: where the recipe keeps the samples' hidden states, and its device; None for in memory.

    Raises:
        BWLAError: there is no such recipe, or it needs calibration data and `options` have none.
        SourceError: the calibration data cannot be used.
    """
    check_recipe(options.recipe, options.calibration)
    if options.recipe == "data-free":
        return DataFreeRecipe(options.seed)
    if options.recipe == "lossless":
        return LosslessRecipe()
    assert options.calibration is not None
    if options.recipe == "paper":
        paper_options = PaperOptions(choose_clip=options.clip is None)
        return PaperRecipe(source, options.calibration, options.seed, paper_options, store)
    fast_options = FastOptions(choose_clip=options.clip is None)
    if options.recipe in (AUTO_RECIPE, "fast"):
        return FastRecipe(source, options.calibration, options.seed, fast_options, store)
    best = best_options(options, fast_options, source.num_layers)
    return BestRecipe(source, options.calibration, options.seed, best, store)


def best_options(options: Options, fast_options: FastOptions, num_layers: int) -> BestOptions:
    """Build `BestOptions`; options not given keep their defaults.

    Args:
        options: options of the conversion. Half of its minutes go to the tuning of the layers, half to distillation.
        fast_options: how the input groups are quantized.
        num_layers: decoder layers of the model.
    """
    best = BestOptions(fast=fast_options)
    tune, distill = best.tune, best.distill
    if options.tune_epochs is not None:
        tune = replace(tune, epochs=options.tune_epochs)
    if options.distill_epochs is not None:
        distill = replace(distill, epochs=options.distill_epochs)
    if options.minutes is not None:
        tune = replace(tune, minutes=options.minutes / 2 / num_layers)
        distill = replace(distill, minutes=options.minutes / 2)
    return replace(best, tune=tune, distill=distill)


def check_recipe(
    name: str, calibration: Calibration | None, planes: int = 1, head_bits: int | None = None
) -> None:
    """Check that the recipe exists, has the calibration data that it needs, and can choose that many planes.

    Raises:
        BWLAError: it does not.
    """
    if name not in RECIPES:
        raise BWLAError(f"recipe {name!r} does not exist: choose one of {', '.join(RECIPES)}")
    if RECIPES[name].needs_calibration and calibration is None:
        raise BWLAError(
            f"recipe {name!r} needs calibration data: give --calibration a text file, a folder of text files, "
            "wikitext2, or self"
        )
    if planes > 1 and name not in SEVERAL_PLANES:
        raise BWLAError(
            f"recipe {name!r} chooses the signs of one plane, found --planes {planes}: use --recipe fast or best"
        )
    if head_bits in HEAD_PLANES and name not in SEVERAL_PLANES:
        raise BWLAError(
            f"recipe {name!r} does not quantize the head, found --lm-head-bits {head_bits}: use --recipe fast or best, "
            "or --lm-head-bits 8"
        )

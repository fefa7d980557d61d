"""The recipes as the pipeline sees them: told of each block, asked for each group, in execution order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from bwla_converter import paper
from bwla_converter.calibrated import FastRecipe
from bwla_converter.calibration import Calibration
from bwla_converter.group import GroupResult
from bwla_converter.source import Source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import LayerSpec
from torch import Tensor

RECIPES = ("paper", "fast")


class Recipe(Protocol):
    """How to quantize a model, block by block."""

    calibration: dict[str, object]
    """What the report and the checkpoint say of the calibration data; empty without."""

    def begin_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Block `index` comes next; its stored tensors by their full names."""

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """One input group of the block."""

    def end_block(self) -> Mapping[str, Tensor]:
        """All groups of the block were quantized; the stored tensors that changed since, by their full names."""

    def state(self) -> Mapping[str, Tensor]:
        """What the next block needs of those before it; `restore` with it goes on as if never interrupted."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a `state`, in place of all blocks before."""

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """The checkpoint in `folder` is complete; the stored tensors to replace in it, by their full names."""


class PaperRecipe:
    """`paper`: from the weights alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calibration: dict[str, object] = {}

    def begin_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to prepare."""

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """By OKT, PSP, signs and scales."""
        return paper.quantize_group(weights, specs, seed=self.seed)

    def end_block(self) -> Mapping[str, Tensor]:
        """Nothing to carry on."""
        return {}

    def state(self) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take up."""

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Nothing to change."""
        return {}


def make_recipe(name: str, source: Source, calibration: Calibration | None, seed: int) -> Recipe:
    """The recipe called `name`.

    Raises:
        BWLAError: there is none of that name, or it needs calibration text and got none.
        SourceError: the text cannot be used.
    """
    check_recipe(name, calibration)
    if name == "paper":
        return PaperRecipe(seed)
    assert calibration is not None
    return FastRecipe(source, calibration, seed)


def check_recipe(name: str, calibration: Calibration | None) -> None:
    """What can be wrong with the choice itself, before the model is looked at.

    Raises:
        BWLAError: as `make_recipe`.
    """
    if name not in RECIPES:
        raise BWLAError(f"recipe {name!r} does not exist: the choice is {', '.join(RECIPES)}")
    if name != "paper" and calibration is None:
        raise BWLAError(f"recipe {name!r} needs text: give --calibration FILE, a folder, or wikitext2")

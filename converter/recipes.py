"""The recipes as the pipeline sees them: told of each block, asked for each group, in execution order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from bwla_converter import fast, paper
from bwla_converter.calibration import Calibration, token_windows
from bwla_converter.group import GroupResult
from bwla_converter.hessian import Moments
from bwla_converter.hf import BWLALinear
from bwla_converter.shell import Block, Shell
from bwla_converter.source import Source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import LayerSpec
from torch import Tensor

RECIPES = ("paper", "fast")
WINDOWS_AT_ONCE = 4


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


class FastRecipe:
    """`fast`: calibration text is carried through the original and the quantized blocks side by side.

    Args:
        source: the model.
        calibration: the text.
        seed: of the windows and of everything random.
        options: of the groups.
    """

    def __init__(
        self, source: Source, calibration: Calibration, seed: int, options: fast.FastOptions | None = None
    ) -> None:
        self.seed, self.options = seed, options or fast.FastOptions()
        ids, digest = token_windows(calibration, source.folder, seed)
        self.calibration: dict[str, object] = {
            "source": Path(calibration.source).name,
            "sha256": digest,
            "samples": calibration.samples,
            "length": calibration.length,
        }
        self.shell = Shell(source, torch.device("cpu"))
        self.hidden = self.shell.embed(ids)
        self.original_hidden = self.hidden
        self._blocks: tuple[Block, Block] | None = None

    @property
    def blocks(self) -> tuple[Block, Block]:
        """The current block as it was, and as it is quantized so far."""
        assert self._blocks is not None
        return self._blocks

    @torch.no_grad()
    def begin_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Build the block twice."""
        self._blocks = (self.shell.block(index, tensors), self.shell.block(index, tensors))

    @torch.no_grad()
    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """In the metric of the group's inputs; the quantized linears take their places in the block."""
        moments = self._moments(next(iter(weights)), next(iter(specs.values())).in_features)
        result = fast.quantize_group(weights, specs, moments, seed=self.seed, options=self.options)
        for name, tensors in result.tensors.items():
            _, quantized = self.blocks
            bias = getattr(quantized.linear(name), "bias", None)
            quantized.replace(name, BWLALinear.from_stored(name, specs[name], tensors, bias))
        return result

    @torch.no_grad()
    def end_block(self) -> Mapping[str, Tensor]:
        """Carry the text through both."""
        original, quantized = self.blocks
        self.original_hidden = self._through(original, self.original_hidden)
        self.hidden = self._through(quantized, self.hidden)
        self._blocks = None
        return {}

    def state(self) -> Mapping[str, Tensor]:
        """The text as both models have it after the blocks so far."""
        return {"original_hidden": self.original_hidden, "hidden": self.hidden}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up the text where it was."""
        self.original_hidden, self.hidden = state["original_hidden"], state["hidden"]

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Nothing to change."""
        return {}

    def _moments(self, name: str, width: int) -> Moments:
        """Of the inputs of the linear called `name`."""
        original, quantized = self.blocks
        moments = Moments.zeros(width, self.hidden.device, crossed=True)
        pairs = zip(
            self.hidden.split(WINDOWS_AT_ONCE), self.original_hidden.split(WINDOWS_AT_ONCE), strict=True
        )
        for here, there in pairs:
            moments.add(quantized.inputs_of(name, here), original.inputs_of(name, there))
        return moments

    def _through(self, block: Block, hidden: Tensor) -> Tensor:
        return torch.cat([block.run(part) for part in hidden.split(WINDOWS_AT_ONCE)])


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

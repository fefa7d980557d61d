"""Recipe `fast` as the pipeline sees it: calibration text runs through the model, block by block."""

from collections.abc import Mapping
from pathlib import Path

import torch
from bwla_converter import fast
from bwla_converter.calibration import Calibration, token_windows
from bwla_converter.group import GroupResult
from bwla_converter.hessian import Moments
from bwla_converter.hf import BWLALinear
from bwla_converter.shell import Block, Shell
from bwla_converter.source import Source
from bwla_kernels.format import LayerSpec
from torch import Tensor

WINDOWS_AT_ONCE = 4


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

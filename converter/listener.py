"""The interface through which a caller follows a conversion."""

from collections.abc import Sequence
from pathlib import Path

from bwla_converter.allocation.stage import Allocation
from bwla_converter.options import LinearReport
from bwla_converter.planning.budget import Budget
from bwla_converter.planning.plan import ConversionPlan
from bwla_converter.source.model import Source


class Listener:
    """Base class of progress listeners; every method does nothing. Override the methods you need.

    A listener may raise KeyboardInterrupt in `layer_done` to stop the conversion without losing any work.
    """

    def dequantized(self, folder: Path, done: int, total: int) -> None:
        """Weights of a GGUF file have been dequantized, before anything else is called. Other models need none of this.

        Args:
            folder: the folder that is being written, in the cache.
            done: number of weights that have been written, 0 in the first call.
            total: number of weights of the model.
        """

    def planned(self, source: Source, plan: ConversionPlan) -> None:
        """The model has been opened and its structure checked; `plan` is what will be written."""

    def budgeted(self, budget: Budget) -> None:
        """Memory, disk space and time have been predicted, and there is enough of them."""

    def written(self, step: int, steps: int) -> None:
        """The model has written a token of every sequence of its own calibration text.

        Args:
            step: number of steps that are done.
            steps: number of all steps.
        """

    def resumed(self, layers: int, weights: int, notes: Sequence[str]) -> None:
        """An earlier conversion is resumed.

        Args:
            layers: number of decoder layers that are finished already.
            weights: number of quantized weights in them.
            notes: which layers have to be quantized again, and why.
        """

    def checked(self, name: str) -> None:
        """All values of the weight called `name` are finite."""

    def quantizing(self) -> None:
        """All checks have passed; quantization starts."""

    def measuring(self, steps: int) -> None:
        """The sensitivities of the input groups are being measured, in `steps` steps."""

    def measured(self) -> None:
        """One step of the measurement is done."""

    def allocated(self, allocation: Allocation) -> None:
        """The planes of every input group are known, and a loss has been predicted."""

    def layer_started(self, index: int) -> None:
        """Quantization of decoder layer `index` starts."""

    def linear_quantized(self, linear: LinearReport) -> None:
        """One linear has been quantized."""

    def head_started(self, planes: int) -> None:
        """All decoder layers are finished; the head is being quantized in `planes` binary planes."""

    def layer_done(self, index: int) -> None:
        """Decoder layer `index` has been written to disk and can be resumed from."""

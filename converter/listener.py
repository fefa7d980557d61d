"""What a front end can be told of a conversion while it runs."""

from collections.abc import Sequence

from bwla_converter.options import LinearReport
from bwla_converter.planning.budget import Budget
from bwla_converter.planning.plan import ConversionPlan
from bwla_converter.source.model import Source


class Listener:
    """What a front end may want to hear; the methods do nothing here.

    One that raises KeyboardInterrupt in `layer_done` stops the conversion where it can be resumed at no loss.
    """

    def planned(self, source: Source, plan: ConversionPlan) -> None:
        """The model is found and its structure checked; `plan` is what will be done."""

    def budgeted(self, budget: Budget) -> None:
        """What it is expected to need; it fits."""

    def resumed(self, blocks: int, weights: int, notes: Sequence[str]) -> None:
        """`blocks` blocks of `weights` weights are there already; `notes` say what must be done again, and why."""

    def checked(self, name: str) -> None:
        """The values of one weight are finite."""

    def quantizing(self) -> None:
        """Everything is checked; the work starts."""

    def layer_started(self, index: int) -> None:
        """Block `index` is being quantized."""

    def quantized(self, layer: LinearReport) -> None:
        """One linear is done."""

    def layer_done(self, index: int) -> None:
        """Block `index` is safely on disk."""

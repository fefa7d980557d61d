"""What a conversion is asked for, what it reports, and who may listen."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bwla_converter.calibration.text import Calibration

if TYPE_CHECKING:
    from bwla_converter.planning.budget import Budget
    from bwla_converter.planning.plan import Plan
    from bwla_converter.source.model import Source


@dataclass(frozen=True)
class Options:
    """What `bwla-convert` was asked for; see its --help.

    `overwrite`, `resume` and `restart` say what to do with what stands there already; all else, and the model,
    decides the result (`work.arguments_of`), but for `report`, `text_samples` (None: a few where the model is small)
    and `hub_repo` (its name in the model card), which are about what is told of it.
    """

    model: str
    out: Path
    recipe: str = "paper"
    rank: int | None = None
    bits: int = 6
    clip: float | None = None
    seed: int = 0
    overwrite: bool = False
    head_bits: int | None = None
    ignore: tuple[str, ...] = ()
    calibration: Calibration | None = None
    tune_epochs: int | None = None
    distill_epochs: int | None = None
    minutes: float | None = None
    resume: bool = False
    restart: bool = False
    device: str = "auto"
    max_memory: int | None = None
    report: bool = True
    text_samples: int | None = None
    hub_repo: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear; `error` is relative, see `group.GroupResult`; `clip` is that of its inputs."""

    name: str
    weights: int
    error: float
    clip: float = 1.0


@dataclass(frozen=True)
class Summary:
    """What a conversion produced; `seconds` counts all its sessions, `fitting_rank` is as in `plan.Plan`."""

    out: str
    rank: int
    fitting_rank: int
    bits_per_weight: float
    weights: int
    bytes_before: int
    bytes_after: int
    seconds: float
    layers: list[LayerReport]


class Listener:
    """What a front end may want to hear; the methods do nothing here.

    One that raises KeyboardInterrupt in `block_done` stops the conversion where it can be resumed at no loss.
    """

    def planned(self, source: "Source", plan: "Plan") -> None:
        """The model is found and its structure checked; `plan` is what will be done."""

    def budgeted(self, budget: "Budget") -> None:
        """What it is expected to need; it fits."""

    def resumed(self, blocks: int, weights: int, notes: Sequence[str]) -> None:
        """`blocks` blocks of `weights` weights are there already; `notes` say what must be done again, and why."""

    def checked(self, name: str) -> None:
        """The values of one weight are finite."""

    def quantizing(self) -> None:
        """Everything is checked; the work starts."""

    def block_started(self, index: int) -> None:
        """Block `index` is being quantized."""

    def quantized(self, layer: LayerReport) -> None:
        """One linear is done."""

    def block_done(self, index: int) -> None:
        """Block `index` is safely on disk."""

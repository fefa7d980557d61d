"""The converter's progress on a terminal: two bars with an ETA, and a line for every layer's error."""

from bwla_converter.pipeline import LayerReport, Listener
from bwla_converter.plan import Plan
from bwla_converter.source import Source
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressListener(Listener):
    """Shows checking and quantizing as bars."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._checking: TaskID | None = None
        self._quantizing: TaskID | None = None

    @staticmethod
    def columns() -> tuple[ProgressColumn, ...]:
        """Columns for the `Progress` that this listener draws on."""
        return (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )

    def planned(self, source: Source, plan: Plan) -> None:
        self._progress.console.print(
            f"{source.family.architecture}, {source.num_blocks} blocks, {plan.weights:,} weights to quantize; "
            f"rank {plan.rank}, {plan.bits_per_weight:.3f} bits per weight all-in",
            highlight=False,
        )
        self._checking = self._progress.add_task("checking  ", total=len(plan.specs) + bool(plan.head_source))
        self._quantizing = self._progress.add_task("quantizing", total=plan.weights, start=False)

    def checked(self, name: str) -> None:
        if self._checking is not None:
            self._progress.advance(self._checking)

    def quantizing(self) -> None:
        if self._quantizing is not None:
            self._progress.start_task(self._quantizing)

    def quantized(self, layer: LayerReport) -> None:
        self._progress.console.print(f"{layer.name}  relative error {layer.error:.4f}", highlight=False)
        if self._quantizing is not None:
            self._progress.advance(self._quantizing, layer.weights)

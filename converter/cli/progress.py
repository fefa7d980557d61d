"""Progress of a conversion on a terminal: two bars with an ETA, and a line with the error of every linear."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bwla_converter.allocation.stage import Allocation, target_option
from bwla_converter.cli.interrupt import Interrupts
from bwla_converter.common.bits import describe_planes, describe_rank, num_weights
from bwla_converter.listener import Listener
from bwla_converter.options import LinearReport
from bwla_converter.planning.budget import Budget
from bwla_converter.planning.plan import ConversionPlan
from bwla_converter.source.model import Source
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


class DequantizationBar:
    """Shows as a bar how much of a GGUF file has been dequantized; nothing for other models. An `OnProgress`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def __call__(self, folder: Path, done: int, total: int) -> None:
        if self._task is None:
            self._progress.console.print(
                f"dequantizing to bfloat16 into {folder}, where later runs find it; it may be deleted afterwards",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            self._task = self._progress.add_task("reading   ", total=total)
        self._progress.update(self._task, completed=done)


class ProgressListener(Listener):
    """Shows the checks and the quantization as bars, and stops after a decoder layer if `interrupts` got a signal."""

    def __init__(self, progress: Progress, interrupts: Interrupts) -> None:
        self._progress, self._interrupts = progress, interrupts
        self._dequantization_bar = DequantizationBar(progress)
        self._checking: TaskID | None = None
        self._writing: TaskID | None = None
        self._measuring: TaskID | None = None
        self._quantizing: TaskID | None = None

    @staticmethod
    def columns() -> tuple[ProgressColumn, ...]:
        """Return the columns of the `Progress` that is passed to this listener."""
        return (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )

    def dequantized(self, folder: Path, done: int, total: int) -> None:
        self._dequantization_bar(folder, done, total)

    def planned(self, source: Source, plan: ConversionPlan) -> None:
        self._say(
            f"{source.structure.architecture}, {source.num_layers} layers, {plan.weights:,} weights to quantize; "
            f"{describe_rank(plan.rank, plan.fitting_rank)}, {_describe_bits(plan)}"
        )
        for note in source.notes:
            self._say(note)
        self._checking = self._progress.add_task(
            "checking  ", total=len(plan.specs) + len(plan.vocabulary_sources)
        )
        head = 0 if plan.head_spec is None else num_weights(plan.head_spec)
        self._quantizing = self._progress.add_task("quantizing", total=plan.weights + head, start=False)

    def budgeted(self, budget: Budget) -> None:
        self._say(str(budget))

    def written(self, step: int, steps: int) -> None:
        if self._writing is None:
            self._say("the model writes its own calibration text; --calibration gives it another one")
            self._writing = self._progress.add_task("writing   ", total=steps)
        self._progress.update(self._writing, completed=step)

    def resumed(self, layers: int, weights: int, notes: Sequence[str]) -> None:
        for note in notes:
            self._say(f"{note}: it will be quantized again")
        self._say(f"resumed: {layers} layers are finished already")
        if self._checking is not None:
            self._progress.update(self._checking, visible=False)
        if self._quantizing is not None:
            # The ETA depends on the remaining weights only.
            total = self._progress.tasks[self._quantizing].total or 0
            self._progress.update(self._quantizing, total=total - weights)

    def checked(self, name: str) -> None:
        if self._checking is not None:
            self._progress.advance(self._checking)

    def quantizing(self) -> None:
        if self._quantizing is not None:
            self._progress.start_task(self._quantizing)

    def measuring(self, steps: int) -> None:
        self._measuring = self._progress.add_task("measuring ", total=steps)

    def measured(self) -> None:
        if self._measuring is not None:
            self._progress.advance(self._measuring)

    def allocated(self, allocation: Allocation) -> None:
        for line in describe_allocation(allocation):
            self._say(line)

    def layer_started(self, index: int) -> None:
        self._interrupts.layer_started(index)

    def linear_quantized(self, linear: LinearReport) -> None:
        self._say(f"{linear.name}  relative error {linear.error:.4f}")
        if self._quantizing is not None:
            self._progress.advance(self._quantizing, linear.weights)

    def head_started(self, planes: int) -> None:
        self._say(f"quantizing the head in {describe_planes(planes)}")

    def layer_done(self, index: int) -> None:
        self._interrupts.layer_done()

    def _say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe_allocation(allocation: Allocation) -> Iterator[str]:
    """Yield lines about the planes, the predicted loss, and what other sizes are predicted to lose."""
    plan = allocation.plan
    shares = ", ".join(
        f"{100 * count / plan.weights:.0f} % of the weights with {planes} plane{'s' if planes > 1 else ''}"
        for planes, count in plan.weights_by_planes.items()
    )
    yield (
        f"predicted loss: {allocation.predicted_loss:.2g} {allocation.loss_unit} at {plan.bits_per_weight:.3f} bits "
        f"per weight ({shares}, {plan.format.bits}-bit activations)"
    )
    others = [f"--bits {bits:g}: {loss:.2g}" for bits, loss in allocation.predicted_losses.items()]
    if others:
        yield f"other sizes are predicted to lose: {', '.join(others)}"
    if allocation.recommended_bits > plan.format.bits:
        yield (
            f"{plan.format.bits}-bit activations cause a large share of this loss: --abits "
            f"{allocation.recommended_bits} is recommended"
        )


def _describe_bits(plan: ConversionPlan) -> str:
    """Return the bits per weight, or the option that decides on them once the sensitivities are measured."""
    if option := target_option(plan.format.provenance):
        return f"{' '.join(option)} decides the planes"
    return f"{plan.bits_per_weight:.3f} bits per weight, everything counted"

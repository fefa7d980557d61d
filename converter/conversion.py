"""What the steps of a conversion share, and the two steps that predict and measure its loss."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bwla_converter.allocation.kept import Numbers, sensitivities_file
from bwla_converter.allocation.sensitivity import Sensitivity, measure_sensitivities, num_samples
from bwla_converter.allocation.stage import Allocation, allocate
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.distributed import Processes
from bwla_converter.calibration.self_text import Writing, write_calibration
from bwla_converter.calibration.text import calibration_samples, held_out_samples, held_out_tokens
from bwla_converter.common.kept import kept_or_computed
from bwla_converter.evaluation.loss import measure_loss
from bwla_converter.listener import Listener
from bwla_converter.options import SELF, Calibration, Options
from bwla_converter.planning.budget import usable_memory
from bwla_converter.planning.plan import ConversionPlan
from bwla_converter.recipes.base import RECIPES, Recipe
from bwla_converter.resume.manifest import LayerReport
from bwla_converter.resume.work_folder import WorkFolder
from bwla_converter.source.model import Source
from bwla_kernels.errors import SourceError
from bwla_kernels.format.folder import text_settings

CUDA_SAMPLES, CPU_SAMPLES = (128, 2048), (32, 1024)
"""Number and length of calibration samples by default: as is usual, and what a CPU carries in minutes."""


@dataclass(frozen=True)
class Conversion:
    """What the steps of a conversion share.

    Attributes:
        options: the options of the caller.
        source: the model to convert.
        plan: what will be written.
        recipe: quantizes the input groups of one decoder layer after another.
        listener: receives the progress.
        store: where activations are kept, the device, and the processes that share the calibration samples.
        allocation: the choice of planes and the predicted loss; None without calibration text.
    """

    options: Options
    source: Source
    plan: ConversionPlan
    recipe: Recipe
    listener: Listener
    store: ActivationStore
    allocation: Allocation | None = None

    @property
    def device(self) -> torch.device:
        """Where the recipe computes."""
        return self.store.device

    @property
    def processes(self) -> Processes:
        """The processes that share the calibration samples."""
        return self.store.processes


def with_calibration(options: Options) -> Options:
    """Return the options with the calibration text that the recipe uses: the model's own by default, or none."""
    if options.recipe in RECIPES and not RECIPES[options.recipe].needs_calibration:
        return replace(options, calibration=None)
    return replace(options, calibration=options.calibration or Calibration(SELF))


def default_amounts(device: torch.device) -> tuple[int, int]:
    """Return the number and the largest length of calibration samples where they were left to us."""
    return CUDA_SAMPLES if device.type == "cuda" else CPU_SAMPLES


def with_amounts(options: Options, source: Source, device: torch.device) -> Options:
    """Return the options with the number and length of the calibration samples, where they were left to us."""
    calibration = options.calibration
    if calibration is None:
        return options
    num_samples, length = default_amounts(device)
    positions = text_settings(source.config).get("max_position_embeddings")
    if isinstance(positions, int):
        length = min(length, positions)
    amounts = replace(
        calibration,
        num_samples=calibration.num_samples or num_samples,
        max_seq_length=calibration.max_seq_length or length,
    )
    return replace(options, calibration=amounts)


def with_written_text(options: Options, source: Source, device: torch.device, listener: Listener) -> Options:
    """Return the options with the file of the calibration text that the model writes itself, if that is their choice.

    Args:
        options: the options, with the number and length of the samples.
        source: the model.
        device: where it runs.
        listener: receives the progress.

    Raises:
        SourceError: the model does not fit into memory, or cannot write text.
    """
    calibration = options.calibration
    if calibration is None or calibration.source != SELF:
        return options
    if not source.structure.has_head:
        raise SourceError(
            f"{source.folder}: expected calibration text, found that {source.structure.architecture} has no "
            "language-model head to write its own: name a text file or a dataset with --calibration"
        )
    on_gpu = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[0] if on_gpu else options.max_memory or usable_memory()
    writing = Writing(source.folder, calibration, options.seed, device, memory)
    file = write_calibration(source, writing, listener.written)
    return replace(options, calibration=replace(calibration, written=file))


def allocated(conversion: Conversion, work: WorkFolder | None) -> Conversion:
    """Return the conversion with the planes that its options ask for, and with a predicted loss.

    Args:
        conversion: the conversion.
        work: keeps the sensitivities, so that a resumed conversion has the same; None in processes other than
            the first.
    """
    options, source, plan = conversion.options, conversion.source, conversion.plan
    if not conversion.recipe.needs_calibration:
        return conversion
    groups = [names for index in range(source.num_layers) for _, names in source.groups_of_layer(index)]
    numbers = [0.0] * 2 * len(groups)
    if work is not None:
        if not work.manifest.sensitivities:
            work.save(sensitivities=_sensitivities(conversion))
        numbers = [number for names in groups for number in work.manifest.sensitivities[names[0]]]
    numbers = conversion.processes.broadcast_numbers(numbers)
    pairs = zip(groups, numbers[::2], numbers[1::2], strict=True)
    sensitivities = {names[0]: Sensitivity(weights, inputs) for names, weights, inputs in pairs}
    allocation = replace(allocate(plan, groups, options, sensitivities), loss_unit=source.structure.loss_unit)
    conversion.listener.allocated(allocation)
    return replace(conversion, plan=allocation.plan, allocation=allocation)


def _sensitivities(conversion: Conversion) -> Numbers:
    """Return the sensitivities of all input groups, measured on some of the calibration samples, or from the cache."""
    options, source, specs = conversion.options, conversion.source, conversion.plan.specs
    assert options.calibration is not None
    ids, _ = calibration_samples(options.calibration, source.folder, options.seed)
    ids = ids[: num_samples(specs, options.calibration.max_seq_length)]
    file = sensitivities_file(source.folder, specs, ids, options.seed, conversion.device.type)

    def measure() -> Numbers:
        conversion.listener.measuring(2 * source.num_layers)
        store = replace(conversion.store, processes=Processes())
        found = measure_sensitivities(source, specs, ids, options.seed, store, conversion.listener.measured)
        return {name: (measured.weights, measured.inputs) for name, measured in found.items()}

    return kept_or_computed(file, Numbers, measure)


def losses(conversion: Conversion, folder: Path) -> dict[str, Any]:
    """Return the summary's losses: predicted, and measured on text that the conversion did not use."""
    allocation, calibration = conversion.allocation, conversion.options.calibration
    if allocation is None or calibration is None:
        return {}
    source, seed = conversion.source, conversion.options.seed
    samples = held_out_samples(calibration, source.folder, seed, held_out_tokens(calibration))
    return {
        "loss_unit": allocation.loss_unit,
        "predicted_loss": allocation.predicted_loss,
        "measured_loss": None
        if samples is None
        else measure_loss(source, folder, samples, conversion.device),
        "predicted_losses": dict(allocation.predicted_losses),
    }


def lossless_note(conversion: Conversion) -> list[str]:
    """Return a sentence about weights that are stored as they are; nothing for other recipes."""
    plan = conversion.plan
    if conversion.options.recipe != "lossless":
        return []
    sizes = sorted({spec.group_width for spec in plan.specs.values()})
    values = "three values" if max(plan.weights_by_planes) > 1 else "two values"
    groups = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    head = "in planes too" if plan.head_spec else "in 8 bits" if plan.head_source else "unquantized"
    embedding = "in 8 bits" if plan.embedding_source else "unquantized"
    return [
        f"the weights have {values} in each group of {groups} columns already and are stored without loss "
        f"(--recipe lossless); the head is stored {head}, the embedding {embedding}"
    ]


def starved_note(reports: Iterable[LayerReport]) -> list[str]:
    """Return a sentence about experts that few calibration tokens reached; nothing where there are none."""
    starved = [name for report in reports for name in report.starved]
    if not starved:
        return []
    several = len(starved) > 1
    named = f"{starved[0].rpartition('.')[0]}{' and others' if several else ''}"
    return [
        f"{len(starved)} expert{'s' if several else ''} ({named}) got fewer calibration tokens from the router than "
        f"the down projection has columns and {'were' if several else 'was'} also fitted to tokens of other experts: "
        "more text helps (--num-calibration-samples)"
    ]

"""Predict the memory, disk space and time of a conversion from the model's headers, and refuse what does not fit.

Each recipe estimates its own memory and compute (`memory_estimates`, `compute_estimate`, checked by
benchmarks/conversion/memory.py); this module adds what every conversion needs and compares the sum with the machine.
The time holds for a machine that does no other work.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from bwla_converter.common.durations import duration
from bwla_converter.common.tensors import entry_bytes
from bwla_converter.common.threads import use_threads
from bwla_converter.options import Calibration
from bwla_converter.planning.disk import merging_bytes, replaced_bytes
from bwla_converter.planning.plan import ConversionPlan
from bwla_converter.recipes.base import RECIPES
from bwla_converter.recipes.fast import head_cost
from bwla_converter.recipes.measurements import (
    measurement_compute,
    measurement_hidden_bytes,
    measurement_memory,
)
from bwla_converter.recipes.workload import (
    FLOAT_BYTES,
    WORKSPACE_BYTES,
    ComputeEstimate,
    MemoryEstimate,
    Workload,
)
from bwla_converter.source.folder.files import beside_bytes
from bwla_converter.source.model import Source
from bwla_kernels.errors import BWLAError
from bwla_kernels.precision import fast_products
from rich.filesize import decimal

COPIES_ON_DISK = 3
"""Hidden states of a model on disk at a time: those after each of the last two layers, and the ones being written."""

USABLE_SHARE = 0.95
"""Share of the free memory that a conversion may use."""

DISK_MARGIN = 1.02
"""Factor on the predicted disk space, for headers and small files."""

CGROUP = Path("/sys/fs/cgroup")


class BudgetError(BWLAError):
    """The conversion needs more memory or disk space than is free or allowed."""


@dataclass(frozen=True)
class MachineSpeed:
    """What this machine does per second.

    Attributes:
        flops: floating-point operations of float32 matrix products.
        bytes_moved: bytes read and written by element-wise operations.
        fast_flops: floating-point operations of matrix products with `precision.fast_products`.
    """

    flops: float
    bytes_moved: float
    fast_flops: float

    def seconds(self, work: ComputeEstimate) -> float:
        """Return the time for `work`."""
        return (
            work.flops / self.flops + work.bytes_moved / self.bytes_moved + work.fast_flops / self.fast_flops
        )


@dataclass(frozen=True)
class Budget:
    """The predicted cost of a conversion.

    Attributes:
        base: memory of the process before the conversion, in bytes.
        work: memory that the conversion adds in its largest step, hidden states not included.
        step: which step that is.
        hidden: size of the hidden states of the calibration samples and of the inputs of linears that are kept with
            them; 0 for a recipe without calibration.
        hidden_in_memory: whether they are kept in memory or on disk.
        output: size of the output on disk.
        kept: size of what the work folder holds in addition during the conversion.
        seconds: time on the CPU.
        threads: threads that it uses there.
    """

    base: float
    work: float
    step: str
    hidden: float
    hidden_in_memory: bool
    output: float
    kept: float
    seconds: float
    threads: int = 1

    @property
    def memory(self) -> float:
        """Peak memory in bytes."""
        return self.base + self.work + (self.hidden if self.hidden_in_memory else 0.0)

    @property
    def disk(self) -> float:
        """Peak disk space in bytes; hidden states are saved there for --resume in any case."""
        return self.output + self.kept

    def __str__(self) -> str:
        place = "in memory" if self.hidden_in_memory else "on disk"
        hidden = f", hidden states {place}" if self.hidden else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"expected: {size(self.memory)} of memory (peak: {self.step}{hidden}), {size(self.disk)} of disk space "
            f"(output {size(self.output)}), about {duration(self.seconds)} on {threads}"
        )


def size(num_bytes: float) -> str:
    """Format a number of bytes in decimal units."""
    return decimal(int(num_bytes))


def predict(
    source: Source,
    plan: ConversionPlan,
    recipe: str,
    calibration: Calibration | None,
    limit: float,
    speed: MachineSpeed | None = None,
    device: str = "cpu",
    epochs: tuple[int | None, int | None] = (None, None),
) -> Budget:
    """Predict the cost of a conversion.

    Args:
        source, plan: the model, and the plan of its conversion.
        recipe: name of the recipe.
        calibration: the calibration data; ignored for a recipe that needs none.
        limit: memory that the conversion may use, in bytes; hidden states that do not fit are kept on disk.
        speed: speed of this machine; None to measure it.
        device: type of the device that computes. The time is that of a CPU in any case.
        epochs: epochs of tuning and of distillation; None for the recipe's default.
    """
    chosen = RECIPES[recipe]
    workload = Workload(
        source,
        plan.specs,
        plan.rank,
        calibration if chosen.needs_calibration else None,
        device,
        chosen.models,
        *epochs,
    )
    base = float(psutil.Process().memory_info().rss)
    # A calibration loop holds the hidden states of each model, and the ones being computed.
    hidden = float((chosen.models + 1) * workload.hidden_bytes + workload.kept_bytes)
    kept = _work_bytes(source, plan, recipe, workload)
    of_head, head_compute = head_cost(plan.head_spec, device)
    estimates = [*_writing_estimates(source, plan), *chosen.memory_estimates(workload), *of_head]
    compute = chosen.compute_estimate(workload) + head_compute
    if chosen.needs_calibration:
        estimates.append(measurement_memory(workload))
        compute += measurement_compute(workload)
        hidden, kept = (max(size, measurement_hidden_bytes(workload)) for size in (hidden, kept))
    peak = max(estimates, key=lambda estimate: (estimate.num_bytes, estimate.step))
    return Budget(
        base=base,
        work=peak.num_bytes,
        step=peak.step,
        hidden=hidden,
        hidden_in_memory=base + peak.num_bytes + hidden <= limit,
        output=float(plan.output_bytes(source) + beside_bytes(source.folder)),
        kept=kept,
        seconds=(speed or measure_speed()).seconds(compute),
        threads=torch.get_num_threads(),
    )


def _work_bytes(source: Source, plan: ConversionPlan, recipe: str, workload: Workload) -> float:
    """Return what the work folder holds in addition to the output, at its peak.

    First that is the state for `--resume` and the parts that the recipe's last step replaces; both are removed before
    the parts are merged.
    """
    chosen, output = RECIPES[recipe], float(plan.output_bytes(source))
    states = float(COPIES_ON_DISK * chosen.models * workload.hidden_bytes + workload.kept_bytes)
    replaced = replaced_bytes(source, plan, recipe == "best") if chosen.needs_calibration else 0.0
    largest = max(float(entry_bytes(source.entries[name])) for name in source.names_outside_layers())
    return max(states + replaced, merging_bytes(output, largest))


def _writing_estimates(source: Source, plan: ConversionPlan) -> list[MemoryEstimate]:
    """Return the memory of writing each tensor outside the layers.

    A tensor is mapped from its file; beside it, the 8-bit head or embedding that is made from it.
    """
    estimates = []
    for name in source.names_outside_layers():
        entry = source.entries[name]
        int8 = math.prod(entry.shape) if name in plan.int8_sources.values() else 0
        estimates.append(MemoryEstimate(entry_bytes(entry) + int8 + WORKSPACE_BYTES, f"writing {name}"))
    return estimates


def check_budget(budget: Budget, limit: float, out: Path, free_disk: float) -> None:
    """Raise if the conversion does not fit.

    Args:
        budget: the prediction.
        limit: memory that may be used, in bytes.
        out: the output folder.
        free_disk: bytes that are free on its disk, or taken by what will be replaced.

    Raises:
        BudgetError: there is too little memory or disk space.
    """
    if budget.memory > limit:
        raise BudgetError(
            f"expected {size(budget.memory)} of memory for the conversion (peak: {budget.step}), found {size(limit)}: "
            "free some memory, use a larger machine, or raise --max-memory if it is set"
        )
    needed = DISK_MARGIN * budget.disk
    if needed > free_disk:
        raise BudgetError(
            f"{out}: expected {size(needed)} of free disk space (output {size(budget.output)}, work folder "
            f"{size(budget.kept)}), found {size(free_disk)}: free some disk space, or use fewer "
            "--num-calibration-samples"
        )


def check_gpu(budget: Budget, device: torch.device) -> None:
    """Raise if the conversion does not fit on the GPU; hidden states stay in the machine's memory.

    Raises:
        BudgetError: the GPU has too little free memory.
    """
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if budget.work > USABLE_SHARE * free:
        raise BudgetError(
            f"--device {device}: expected {size(budget.work)} of GPU memory for the conversion (peak: {budget.step}), "
            f"found {size(free)} free: free some memory, or use --device cpu"
        )


def measure_speed(order: int = 768) -> MachineSpeed:
    """Time matrix products on all threads and an element-wise operation on one, some ten milliseconds each.

    Element-wise work hardly scales: it is bound by memory, and much of it runs on tensors too small to be divided.
    """
    matrix, vector = torch.ones(order, order), torch.ones(2**22)

    def seconds(operation: Callable[[], object]) -> float:
        best = math.inf
        for _ in range(3):
            started = time.perf_counter()
            operation()
            best = min(best, time.perf_counter() - started)
        return best

    with fast_products(torch.device("cpu")):
        fast = seconds(lambda: matrix @ matrix)
    with use_threads(1):
        element_wise = seconds(vector.sigmoid)
    return MachineSpeed(
        flops=2 * order**3 / seconds(lambda: matrix @ matrix),
        bytes_moved=2 * FLOAT_BYTES * vector.numel() / element_wise,
        fast_flops=2 * order**3 / fast,
    )


def usable_memory() -> float:
    """Return the memory that this process may use in all, in bytes.

    That is what it has, and most of what is free on the machine and in its control group.
    """
    free = float(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or one without a limit
    return float(psutil.Process().memory_info().rss) + USABLE_SHARE * free

"""What a conversion will need - memory, disk, time - told from the headers, so that it is refused before work.

Memory is counted the way the recipes allocate it: each step of `paper.quantize_group` and `fast.quantize_group` holds
a number of float32 copies of the group's weights [N, K] and of matrices [K, K], given below and kept true by
benchmarks/convert_memory.py. Time is flops and passes over memory, at this machine's measured rates; a machine that
does other work at the same time takes longer.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from bwla_converter.options import Calibration
from bwla_converter.planning.plan import ConversionPlan
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.quantize.gptq_binary import row_chunk_elements
from bwla_converter.source.model import Source
from bwla_converter.source.names import EMBEDDING_WEIGHT
from bwla_converter.training.distill import DISTILLATION
from bwla_converter.training.stages import sections
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.folder import Entry

FLOAT = 4
WORK_SPACE = 160e6
"""Bytes for what is handled in pieces: chunks of rows, statistics, files being written."""

WINDOWS_AT_ONCE = 4
STATES_ON_DISK = 3
"""Generations of the hidden states that are on disk at a time: the last two blocks' and the one being written."""

OKT_ROUNDS, PSP_ROUNDS, SCALE_ROUNDS = 40, 20, 12
FREE_SHARE = 0.95
"""Share of the free memory that a conversion may plan with."""


class BudgetError(BWLAError):
    """The conversion needs more than there is, or than it was given."""


@dataclass(frozen=True)
class Group:
    """One input group: pooled rows N, columns K."""

    rows: int
    columns: int

    @property
    def weights(self) -> int:
        """N * K."""
        return self.rows * self.columns

    @property
    def square(self) -> int:
        """K * K."""
        return self.columns**2


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second: flops of a float32 matrix product, bytes passed over by element-wise work."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Budget:
    """A prediction.

    Attributes:
        base: bytes that the process takes before it begins.
        work: bytes that the conversion adds at its worst moment, hidden states aside.
        moment: which moment that is.
        hidden: bytes of the hidden states, which may be in memory or on disk; 0 where there are none.
        hidden_in_memory: whether they are in memory.
        output, kept: bytes on disk of the output, and of what the work folder holds besides while it works.
        seconds: working time.
    """

    base: float
    work: float
    moment: str
    hidden: float
    hidden_in_memory: bool
    output: float
    kept: float
    seconds: float

    @property
    def memory(self) -> float:
        """Peak bytes of memory."""
        return self.base + self.work + (self.hidden if self.hidden_in_memory else 0.0)

    @property
    def disk(self) -> float:
        """Peak bytes of disk; hidden states are on it either way, for --resume."""
        return self.output + self.kept

    def __str__(self) -> str:
        where = (
            ""
            if not self.hidden
            else f", hidden states {'in memory' if self.hidden_in_memory else 'on disk'}"
        )
        return (
            f"expected: {self.memory / 1e9:.1f} GB of memory (the most in {self.moment}{where}), "
            f"{self.disk / 1e9:.1f} GB of disk (output {self.output / 1e9:.1f}), about {duration(self.seconds)}"
        )


def duration(seconds: float) -> str:
    """A length of time, in words."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def predict(
    source: Source,
    plan: ConversionPlan,
    recipe: str,
    calibration: Calibration | None,
    limit: float,
    rates: Rates | None = None,
    device: str = "cpu",
) -> Budget:
    """Predict a conversion; its time as if it were on the CPU.

    Args:
        source, plan: what is converted, and to what.
        recipe: its name.
        calibration: its text.
        limit: bytes of memory that it may take; hidden states go to disk where they do not fit.
        rates: of this machine; measured where not given.
        device: kind of the device that computes.
    """
    rates = rates or measure_rates()
    base = float(resident_bytes())
    tokens = calibration.num_samples * calibration.max_seq_length if calibration and recipe != "paper" else 0
    hidden = (
        3.0 * FLOAT * tokens * source.entries[EMBEDDING_WEIGHT].shape[1]
    )  # both models', and one being made
    work, moment = max(_moments(source, plan, recipe, calibration, device))
    output = float(plan.output_bytes(source))
    kept = STATES_ON_DISK * hidden * 2 / 3
    return Budget(
        base=base,
        work=work,
        moment=moment,
        hidden=hidden,
        hidden_in_memory=base + work + hidden <= limit,
        output=output,
        kept=kept,
        seconds=_seconds(source, plan, recipe, tokens, rates),
    )


def check_budget(budget: Budget, limit: float, out: Path, free_disk: float) -> None:
    """Refuse what does not fit.

    Args:
        budget: the prediction.
        limit: bytes of memory that may be taken.
        out: the output.
        free_disk: bytes that are free there, or taken by what will be replaced.

    Raises:
        BudgetError: memory or disk is too small.
    """
    if budget.memory > limit:
        raise BudgetError(
            f"the conversion would need {budget.memory / 1e9:.1f} GB of memory (the most in {budget.moment}), found "
            f"{limit / 1e9:.1f} GB to use: free some, use a larger machine, or raise --max-memory where it is set"
        )
    if budget.disk * 1.02 > free_disk:
        raise BudgetError(
            f"{out}: expected {budget.disk * 1.02 / 1e9:.2f} GB of free disk space (output "
            f"{budget.output / 1e9:.2f}, work folder {budget.kept / 1e9:.2f}), found {free_disk / 1e9:.2f} GB: free "
            "some, or use fewer --num-calibration-samples"
        )


def check_gpu(budget: Budget, device: torch.device) -> None:
    """Refuse what does not fit on a GPU; hidden states stay in the machine's memory.

    Raises:
        BudgetError: the GPU's free memory is too small.
    """
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if budget.work > FREE_SHARE * free:
        raise BudgetError(
            f"--device {device}: the conversion would need {budget.work / 1e9:.1f} GB of its memory (the most in "
            f"{budget.moment}), found {free / 1e9:.1f} GB free: free some, or use --device cpu"
        )


def _groups(source: Source, plan: ConversionPlan, index: int) -> Iterator[tuple[str, Group]]:
    for _, names in source.groups_of_layer(index):
        specs = [plan.specs[name] for name in names]
        rows = sum(spec.out_features for spec in specs)
        yield names[0].rpartition(".")[2], Group(rows, specs[0].in_features)


def _bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _moments(
    source: Source, plan: ConversionPlan, recipe: str, calibration: Calibration | None, device: str
) -> Iterator[tuple[float, str]]:
    """Bytes held at the moments that may be the worst, with a name for each."""
    for name in source.names_outside_layers():
        # Mapped from its file, and with it the 8-bit head that is made of it.
        made = math.prod(source.entries[name].shape) if name == plan.head_source else 0
        yield _bytes(source.entries[name]) + made + WORK_SPACE, f"writing {name}"
    if recipe == "best":
        assert calibration is not None
        yield _distilling_bytes(source, plan, calibration), "distillation"
    shapes = set()
    for index in range(source.num_layers):
        groups = tuple(_groups(source, plan, index))
        if groups in shapes:
            continue
        shapes.add(groups)
        entries = [source.entries[name] for name in source.names_of_layer(index)]
        stored = sum(map(_bytes, entries))
        weights = sum(math.prod(entry.shape) for entry in entries)
        for number, (label, group) in enumerate(groups):
            left = sum(other.weights for _, other in groups[number:])
            moment = f"block {index}, {label}"
            if recipe == "paper":
                yield stored + 4 * FLOAT * group.weights + WORK_SPACE, moment
                continue
            assert calibration is not None
            blocks = stored + FLOAT * (weights + left)
            held = blocks + WORK_SPACE
            yield held + _fast_bytes(group, device), moment
            yield held + _forward_bytes(source, groups, calibration, group), f"{moment}, its inputs"
            if recipe != "fast":
                yield (
                    stored + _tuning_bytes(source, groups, weights, calibration) + WORK_SPACE,
                    (f"block {index}, tuning"),
                )


def _fast_bytes(group: Group, device: str) -> float:
    """The worst of the steps of `fast.quantize_group`, moments included."""
    target = 7 * group.weights + 7 * group.square  # cholesky_solve in float64
    inverse = 3 * group.weights + 11 * group.square  # inverse_cholesky in float64
    at_once = min(group.weights, row_chunk_elements(device))
    signs = 5 * group.weights + 15 * at_once + 4 * group.square  # error feedback and coordinate descent
    return float(FLOAT * max(target, inverse, signs))


def _forward_bytes(
    source: Source, groups: tuple[tuple[str, Group], ...], calibration: Calibration, group: Group
) -> float:
    """Activations of the windows at once in one block, and the moments of a group's inputs."""
    tokens = min(WINDOWS_AT_ONCE, calibration.num_samples) * calibration.max_seq_length
    widths = sum(other.rows for _, other in groups) + 4 * groups[0][1].columns
    return float(FLOAT * (tokens * (widths + 2 * group.columns) + 2 * group.square))


def _tuning_bytes(
    source: Source, groups: tuple[tuple[str, Group], ...], weights: int, calibration: Calibration
) -> float:
    """Recipe `best`: latent weights with gradient and Adam's two moments beside the original block, and activations
    kept for the backward pass."""
    tokens = min(WINDOWS_AT_ONCE, calibration.num_samples) * calibration.max_seq_length
    kept = sum(other.rows + 4 * other.columns for _, other in groups)
    return float(FLOAT * (6 * weights + tokens * 2 * kept))


def _distilling_bytes(source: Source, plan: ConversionPlan, calibration: Calibration) -> float:
    """Recipe `best` at its end: the whole model with signs in int8, embedding and heads in float32, a section's latent
    weights with gradient and Adam's two moments, the activations of a batch kept for the backward pass, and six copies
    of its logits."""
    tokens = min(DISTILLATION.batch, calibration.num_samples) * calibration.max_seq_length
    section = max(weights for _, weights in sections(source))
    vocabulary, width = source.entries[EMBEDDING_WEIGHT].shape
    kept = sum(spec.out_features + 2 * spec.in_features for spec in plan.specs.values())
    logits = tokens * (kept + 6 * vocabulary)
    return float(plan.weights + FLOAT * (3 * vocabulary * width + 4 * section + logits))


def _seconds(source: Source, plan: ConversionPlan, recipe: str, tokens: int, rates: Rates) -> float:
    flops = passed = 0.0
    passes = FastOptions().passes
    for index in range(source.num_layers):
        for _, group in _groups(source, plan, index):
            spread = 2 * math.isqrt(group.columns)  # n1 + n2 of one block
            okt = OKT_ROUNDS * group.weights
            flops += 8 * okt * spread / 2
            passed += 24 * FLOAT * okt
            if recipe == "paper":
                flops += 20 * PSP_ROUNDS * group.weights * (plan.rank + 8)
                passed += FLOAT * group.weights * (16 * PSP_ROUNDS + 4 * SCALE_ROUNDS)
                continue
            flops += 4 * passes * group.rows * group.square + 8 * group.columns**3
            passed += passes * 530 * group.weights
            flops += 4 * tokens * group.square + 2 * 5 * tokens * group.weights
            if recipe != "fast":
                flops += 8 * 6 * tokens * group.weights
    if recipe == "best":
        head = math.prod(source.entries[EMBEDDING_WEIGHT].shape)
        flops += 16 * DISTILLATION.epochs * tokens * (plan.weights + head)
    return flops / rates.flops + passed / rates.bytes


def measure_rates(size: int = 768) -> Rates:
    """Time a matrix product and an element-wise pass, each some ten milliseconds."""
    left = torch.ones(size, size)
    wide = torch.ones(2**22)

    def seconds(run: object) -> float:
        best = math.inf
        for _ in range(3):
            started = time.perf_counter()
            run()  # type: ignore[operator]
            best = min(best, time.perf_counter() - started)
        return best

    return Rates(2 * size**3 / seconds(lambda: left @ left), 2 * FLOAT * 2**22 / seconds(wide.sigmoid))


def resident_bytes() -> int:
    """Memory that this process has now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def usable_memory() -> float:
    """Bytes that this process may plan with: what it has, and most of what is free here and in its control group."""
    free = math.inf
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or none with a limit
    return resident_bytes() + FREE_SHARE * free


def parse_size(text: str) -> int:
    """Bytes of `12GB`, `800MB`, `16GiB` or a plain number.

    Raises:
        ValueError: none of these.
    """
    units = {
        "KB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "TB": 1e12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "TIB": 2**40,
    }
    upper = text.strip().upper().replace(" ", "")
    for unit in sorted(units, key=len, reverse=True):
        if upper.endswith(unit):
            return round(float(upper.removesuffix(unit)) * units[unit])
    return int(upper)

"""Tune with `bwla_kernels.triton.tune`, one case for each candidate, and write the resulting table."""

import json
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch
from bwla_kernels.triton import tune
from bwla_kernels.triton.binary_matmul import binary_matmul
from bwla_kernels.triton.gpu import gpu_properties
from bwla_kernels.triton.layout import ChunkLayout, layer_layout
from bwla_kernels.triton.tuning import MatmulConfig, table_arch

from benchmarks.kernels.gpu.journal import Case, Journal, Row
from benchmarks.kernels.gpu.shapes import MODELS, Setting, Shape
from benchmarks.kernels.gpu.timing import time_calls

ROUNDS = (1,), (8, 4, 2), (64, 4096, 16, 256, 1024)
"""Numbers of tokens, most important first; each is tuned for all models before the next."""

TINY_BYTES, TINY_CANDIDATES = 1 << 16, 2


def layout_of(shape: Shape) -> ChunkLayout:
    """Return the layout of a shape's weights."""
    return layer_layout(shape.spec())


@lru_cache(maxsize=1)
def _problem(layout: ChunkLayout, m: int, device: torch.device) -> tune.Problem:
    if device.type == "cuda":
        return tune.draw(layout, m, device)
    return tune.draw(layout, m, device, TINY_BYTES, torch.float16)


def _time(problem: tune.Problem, config: MatmulConfig) -> float:
    """Return the median microseconds with cold weights."""
    device = problem.expected.device
    calls = [
        partial(binary_matmul, problem.prepared, weights, tune.BITS, config, problem.dtype)
        for weights in problem.weights
    ]
    return time_calls(calls[: None if device.type == "cuda" else 1], device).median


def _run(row: Row, layout: ChunkLayout, m: int, config: MatmulConfig, setting: Setting) -> None:
    finding = tune.try_config(_problem(layout, m, setting.device), config, _time)
    row |= finding.row()
    if finding.microseconds:
        width = layout.groups * layout.group_width
        packed = layout.planes * layout.out_features * width / 8
        row["packed_tb_s"] = packed / finding.microseconds / 1e6


def order(setting: Setting) -> Iterator[tuple[str, Shape, int]]:
    """Yield (model, shape, tokens), most important first."""
    for tokens in ROUNDS if setting.on_gpu else ROUNDS[:1]:
        for model in setting.models + setting.decoded * (tokens == ROUNDS[0]):
            for m in tokens:
                for shape in list(MODELS[model].values())[: None if setting.on_gpu else 1]:
                    yield model, shape, m


def first_round(layout: ChunkLayout, m: int, setting: Setting) -> list[MatmulConfig]:
    """Return `tune.candidates` for this GPU; in the interpreter, only a few of them."""
    found = tune.candidates(layout, m, *gpu_properties(setting.device))
    return found if setting.on_gpu else found[:TINY_CANDIDATES]


def cases(setting: Setting, journal: Journal) -> Iterator[Case]:
    """Yield the step's cases; those of the second round depend on the first round's results in the journal."""
    for model, shape, m in order(setting):
        layout = layout_of(shape)
        prefix = f"{model} {shape.name} m={m} "

        def case(
            config: MatmulConfig,
            prefix: str = prefix,
            layout: ChunkLayout = layout,
            m: int = m,
        ) -> Case:
            return Case(
                f"{prefix}{config}", partial(_run, layout=layout, m=m, config=config, setting=setting)
            )

        first = first_round(layout, m, setting)
        yield from map(case, first)
        if setting.on_gpu:
            yield from map(
                case, tune.second_round([f for f in _findings(journal, prefix) if f.config in first])
            )


def _findings(journal: Journal, prefix: str) -> list[tune.Finding]:
    """Return the journal's results of a shape's candidates; those that killed their process have no configuration."""
    names = MatmulConfig.__dataclass_fields__
    return [
        tune.Finding(MatmulConfig(**{name: row[name] for name in names}), row.get("us"), row.get("error"))
        for row in journal.rows("tune")
        if row.get("case", "").startswith(prefix) and "kernel" in row
    ]


def write_table(setting: Setting, journal: Journal, path: Path) -> int:
    """Write the package's table with the fastest configuration of each shape; return their number."""
    arch = table_arch(gpu_properties(setting.device)[0])
    name = torch.cuda.get_device_name(setting.device) if setting.on_gpu else "no GPU: Triton's interpreter"
    table, count = tune.new_table(name, arch), 0
    for model, shape, m in order(setting):
        for best in tune.fastest(_findings(journal, f"{model} {shape.name} m={m} "))[:1]:
            spec = shape.spec()
            sizes = (spec.out_features, spec.in_features, spec.rotation_groups, spec.planes)
            tune.enter(table, arch, sizes, m, best.config)
            count += 1
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return count

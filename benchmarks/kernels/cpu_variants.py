"""Time two variants of the CPU kernel side by side on layers with many tokens: table lookup against AMX.

    python -m benchmarks.kernels.cpu_variants --quick
    python -m benchmarks.kernels.cpu_variants --out benchmarks/results/cpu_variants.json

For each shape, number of tokens M and number of threads, the whole layer and its GEMM alone are timed in turn with both
variants for many rounds, in one process. Figures are medians; the speedup is the median of the ratios within each
round, since other work on a shared machine slows both. Before that, the outputs of the two are compared bit by bit.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bwla_converter.checkpoint.dummy import random_layer
from bwla_kernels.cpu import linear as kernel
from bwla_kernels.cpu.library import Isa, load
from bwla_kernels.factorize import SHARDED_ROTATION_GROUPS, choose_rotation
from bwla_kernels.format import LayerSpec
from rich.console import Console
from rich.table import Table

from benchmarks.common.record import write_result
from benchmarks.kernels.cpu_layer import RANK, time_in_turn

TOKENS = (16, 64, 512, 2048)
THREADS = (1, 2)
SHAPES = [
    (960, 576, 1),
    (3072, 576, 1),
    (576, 1536, SHARDED_ROTATION_GROUPS),
    (1024, 3072, SHARDED_ROTATION_GROUPS),
    (4096, 4096, 1),
    (4096, 12288, SHARDED_ROTATION_GROUPS),
]
"""N, K and preferred number of rotation groups: linears of SmolLM2-135M (qkv, gate_up, down), Qwen3-0.6B (down) and
Qwen3-8B (q, down)."""
QUICK = [(960, 576, 1), (4096, 4096, 1)]


@dataclass(frozen=True)
class Row:
    """One row of the result; times in microseconds, `before` and `after` are the two variants."""

    n: int
    k: int
    rotation_groups: int
    bits: int
    m: int
    threads: int
    before_us: float
    after_us: float
    speedup: float
    before_matmul_us: float
    after_matmul_us: float
    matmul_speedup: float
    before_gmacs: float
    after_gmacs: float


def compare(spec: LayerSpec, m: int, threads: int, variants: tuple[Isa, Isa], budget: float) -> Row:
    """Time one layer with both variants.

    Raises:
        SystemExit: the outputs of the variants differ.
    """
    generator = torch.Generator().manual_seed(m)
    stored = random_layer(spec, generator)
    x = torch.randn(m, spec.in_features, generator=generator).bfloat16()
    packed = {isa: kernel.pack(stored, spec, isa) for isa in variants}
    outputs = [kernel.linear(x, packed[isa], spec, isa=isa, threads=threads) for isa in variants]
    if not torch.equal(*outputs):
        raise SystemExit(
            f"{spec}, {m} tokens: the outputs of {variants[0].name} and {variants[1].name} differ"
        )
    prepared = kernel.prepare_input(x, packed[variants[0]], spec, variants[0])

    def whole(isa: Isa) -> object:
        return kernel.linear(x, packed[isa], spec, isa=isa, threads=threads)

    def matmul(isa: Isa) -> object:
        return kernel.binary_matmul(*prepared, packed[isa], spec, x.dtype, isa, threads)

    steps = [lambda _, step=step, isa=isa: step(isa) for step in (whole, matmul) for isa in variants]
    samples = time_in_turn(steps, budget)
    times = [statistics.median(step) for step in samples]
    ratios = [
        statistics.median(a / b for a, b in zip(samples[i], samples[i + 1], strict=True)) for i in (0, 2)
    ]
    macs = m * spec.out_features * spec.in_features / 1e3
    return Row(
        spec.out_features, spec.in_features, spec.rotation_groups, spec.bits, m, threads,
        times[0], times[1], ratios[0], times[2], times[3], ratios[1], macs / times[0], macs / times[1],
    )  # fmt: skip


def measure(
    shapes: Sequence[tuple[int, int, int]], arguments: argparse.Namespace, variants: tuple[Isa, Isa]
) -> Iterator[Row]:
    """Yield a row for each shape, number of tokens and number of threads."""
    for n, k, preferred in shapes:
        spec = LayerSpec(n, k, *choose_rotation(k, preferred), rank=RANK, bits=arguments.bits)
        for m in map(int, arguments.tokens.split(",")):
            for threads in map(int, arguments.threads.split(",")):
                row = compare(spec, m, threads, variants, arguments.seconds)
                times = f"{row.before_us:.0f} -> {row.after_us:.0f} us"
                print(f"{n}x{k} M={m} threads={threads}: {times}, {row.speedup:.2f}x", flush=True)
                yield row


def show(rows: Sequence[Row], variants: tuple[Isa, Isa]) -> None:
    """Print the rows as a table."""
    before, after = (isa.name.lower() for isa in variants)
    table = Table(title="microseconds (medians) of the whole layer and of its GEMM alone")
    headings = (
        "N x K",
        "M",
        "threads",
        before,
        after,
        "speedup",
        "GEMM",
        f"GEMM {after}",
        "speedup",
        "GMAC/s",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.n}x{row.k}", str(row.m), str(row.threads),
            f"{row.before_us:.0f}", f"{row.after_us:.0f}", f"{row.speedup:.2f}",
            f"{row.before_matmul_us:.0f}", f"{row.after_matmul_us:.0f}", f"{row.matmul_speedup:.2f}",
            f"{row.after_gmacs:.0f}",
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default="avx512vbmi,amx", help="two variants (avx512vbmi,amx)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="values of M (16,64,512,2048)")
    parser.add_argument("--threads", default=",".join(map(str, THREADS)), help="numbers of threads (1,2)")
    parser.add_argument("--bits", type=int, default=6, help="bits of the activations (6)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for one shape, M and threads (3)")
    parser.add_argument("--quick", action="store_true", help="two shapes, less than a minute")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    names = arguments.variants.upper().split(",")
    if len(names) != 2 or not set(names) <= set(Isa.__members__):
        parser.error(
            f"--variants: expected two of {', '.join(Isa.__members__).lower()}, found {arguments.variants}"
        )
    variants = (Isa[names[0]], Isa[names[1]])
    handle = load().handle
    for isa in variants:
        if not handle.bwla_isa_supported(isa):
            reason = f": {handle.bwla_no_amx().decode()}" if isa is Isa.AMX else ""
            raise SystemExit(f"this machine cannot run the variant {isa.name.lower()}{reason}")
    if arguments.quick:
        arguments.seconds = min(arguments.seconds, 1.0)
    rows = []
    for row in measure(QUICK if arguments.quick else SHAPES, arguments, variants):
        rows.append(row)
    show(rows, variants)
    if arguments.out:
        write_result(
            arguments.out,
            [vars(row) for row in rows],
            variants=[isa.name.lower() for isa in variants],
            rank=RANK,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

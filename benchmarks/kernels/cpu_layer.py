"""Time one BWLA layer and bf16 on this machine's CPU, side by side in one process.

    python -m benchmarks.kernels.cpu_layer --quick
    python -m benchmarks.kernels.cpu_layer --models 8b,32b --tokens 1,128 --out benchmarks/results/cpu_layer.json

For each shape and number of tokens M, these are timed in turn for many rounds: a plain read of memory, the whole BWLA
layer, its GEMM alone (the library's function: no rotation, no low-rank correction, no torch), vLLM's bf16 linear
(oneDNN, prepacked) and torch's. Each call uses the next of several copies of the weights, which together exceed the
last-level cache; calls below four milliseconds are timed in runs that take that long. Figures are medians; "share of
read" is the median of the ratios within each round, since the speed of memory varies from second to second.
"""

import argparse
import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bwla_converter.checkpoint.dummy import random_layer
from bwla_kernels import ops, reference
from bwla_kernels.cpu import linear as kernel
from bwla_kernels.cpu.library import LayerStruct, load
from bwla_kernels.factorize import SHARDED_ROTATION_GROUPS, choose_rotation
from bwla_kernels.format import LayerSpec
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.record import write_result

Step = Callable[[int], object]
"""A timed call; its argument is the number of the call."""

RANK = 16
RUN_SECONDS = 4e-3
TOKENS = (1, 4, 16, 128, 512)
SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "0.6b": [
        (4096, 1024, 1),
        (1024, 2048, SHARDED_ROTATION_GROUPS),
        (6144, 1024, 1),
        (1024, 3072, SHARDED_ROTATION_GROUPS),
    ],
    "1.7b": [
        (4096, 2048, 1),
        (2048, 2048, SHARDED_ROTATION_GROUPS),
        (12288, 2048, 1),
        (2048, 6144, SHARDED_ROTATION_GROUPS),
    ],
    "8b": [
        (6144, 4096, 1),
        (4096, 4096, SHARDED_ROTATION_GROUPS),
        (24576, 4096, 1),
        (4096, 12288, SHARDED_ROTATION_GROUPS),
    ],
    "32b": [
        (10240, 5120, 1),
        (5120, 8192, SHARDED_ROTATION_GROUPS),
        (51200, 5120, 1),
        (5120, 25600, SHARDED_ROTATION_GROUPS),
    ],
}
"""qkv, o, gate_up and down of the Qwen3 models, as vLLM fuses them: N, K, preferred number of rotation groups."""
QUICK = [(10240, 5120, 1), (4096, 12288, SHARDED_ROTATION_GROUPS)]


@dataclass(frozen=True)
class Row:
    """One row of the result; times in microseconds."""

    n: int
    k: int
    m: int
    rotation_groups: int
    bwla_us: float
    bwla_matmul_us: float
    vllm_bf16_us: float
    torch_bf16_us: float
    packed_gbps: float
    read_gbps: float
    read_share: float
    bwla_gops: float


def last_level_cache() -> int:
    """Return the bytes of the largest cache that Linux reports; 64 MiB if it reports none."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    caches = [int(text[:-1]) * units[text[-1]] for path in sizes if (text := path.read_text().strip())]
    return max(caches, default=64 << 20)


def copies(tensor: Tensor, cold: int) -> list[Tensor]:
    """Return copies of a tensor, on huge pages as the kernel uses, that together exceed `cold` bytes."""
    count = max(2, -(-cold // tensor.nbytes))
    return [
        kernel.empty_huge(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)
        for _ in range(count)
    ]


class Weights:
    """Copies of one shape's weights for each method: the packed layer, vLLM's linear, torch's matrix."""

    def __init__(self, spec: LayerSpec, cold: int, peers: bool = True) -> None:
        self.spec, self.bare = spec, replace(spec, rank=0)
        self.stored = random_layer(spec, torch.Generator().manual_seed(0))
        self.backend, reason = ops.select_backend(spec, torch.device("cpu"))
        if self.backend.name != "cpu":
            raise SystemExit(f"the CPU kernel is not in use here: {reason}")
        self.whole = copies(self.backend.prepare(self.stored, spec)["packed"], cold)
        self.alone = copies(kernel.pack(self.stored, self.bare), cold)
        self.plain, self.vllm = [], []
        if not peers:
            return
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        self.plain = copies(torch.randn(spec.out_features, spec.in_features, dtype=torch.bfloat16), cold)
        for weight in self.plain:
            layer = torch.nn.Module()
            layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
            self.vllm.append(layer)

    def steps(self, x: Tensor) -> tuple[Step, Step, Step, Step]:
        """Return the calls: the BWLA layer, its GEMM alone (no low-rank correction), vLLM's bf16 linear, torch's."""
        prepared = reference.prepare_input(x, self.stored, self.bare)
        out = torch.empty(len(x), self.spec.out_features, dtype=x.dtype)
        library, threads = load(), torch.get_num_threads()
        struct = LayerStruct(
            library.isa,
            self.bare.bits,
            self.bare.out_features,
            self.bare.rotation_groups,
            self.bare.n1,
            self.bare.n2,
            0,
            self.bare.planes,
            1.0,
        )
        sizes, function = ctypes.addressof(struct), library.handle.bwla_binary_matmul
        arguments = (prepared.q.data_ptr(), prepared.scale.data_ptr(), None, len(x))
        # The arguments are prepared here: the weights that a call streams evict Python's objects from the caches, so
        # that preparing them in the call would add 4 to 9 us.
        calls = [
            (sizes, packed.data_ptr(), *arguments, out.data_ptr(), kernel.DTYPES[x.dtype], threads)
            for packed in self.alone
        ]

        def layer(i: int) -> Tensor:
            return self.backend.apply(x, {"packed": self.whole[i % len(self.whole)]}, self.spec)

        def matmul(i: int) -> object:
            function(*calls[i % len(calls)])
            return struct, prepared, out  # keeps them alive: `calls` contains their addresses

        def vllm(i: int) -> Tensor:
            chosen: Any = self.vllm[i % len(self.vllm)]
            result: Tensor = chosen.cpu_linear(x, chosen.weight, None)
            return result

        return layer, matmul, vllm, lambda i: torch.nn.functional.linear(x, self.plain[i % len(self.plain)])


def read_step(cold: int) -> Step:
    """Return a step that reads `cold` bytes with all of torch's threads."""
    data = kernel.empty_huge(4 * cold).zero_().view(torch.float32).view(4, -1)
    return lambda i: data[i % 4].sum()


def short_read_step(size: int, cold: int) -> Step:
    """Return a step that reads `size` bytes with all of torch's threads, each time another part of `cold` bytes."""
    pieces = kernel.empty_huge(cold).zero_().view(torch.float32).split(size // 4)[: cold // size]
    return lambda i: pieces[i % len(pieces)].sum()


def calls_in_a_row(step: Step, clock: Callable[[], float] = time.perf_counter) -> int:
    """Return the number of calls that take `RUN_SECONDS` of a clock."""
    step(0)  # warm-up: code, threads, lazy packing
    started = clock()
    step(1)
    return max(1, min(64, math.ceil(RUN_SECONDS / (clock() - started))))


def time_in_turn(
    steps: Sequence[Step], budget: float, least: int = 5, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Time the steps in turn for `budget` seconds and at least `least` rounds; return microseconds per call.

    `clock` is what they are timed with: `time.process_time` on a core that other processes use too.
    """
    counts = [calls_in_a_row(step, clock) for step in steps]
    times: list[list[float]] = [[] for _ in steps]
    begun, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - begun < budget:
        for step, count, samples in zip(steps, counts, times, strict=True):
            started = clock()
            for i in range(rounds * count, (rounds + 1) * count):
                step(i)
            samples.append(1e6 * (clock() - started) / count)
        rounds += 1
    return times


def measure(shapes: Sequence[tuple[int, int, int]], tokens: Sequence[int], budget: float) -> Iterator[Row]:
    """Yield a row for each shape and number of tokens."""
    cold = 3 * last_level_cache()
    read = read_step(cold)
    for n, k, preferred in shapes:
        groups, n1, n2 = choose_rotation(k, preferred)
        weights = Weights(LayerSpec(n, k, groups, n1, n2, rank=RANK), cold)
        for m in tokens:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
            samples = time_in_turn((read, *weights.steps(x)), budget)
            read_us, whole_us, matmul_us, *others_us = (statistics.median(step) for step in samples)
            packed = n * k / 8
            share = statistics.median(
                packed / cold * a / b for a, b in zip(samples[0], samples[2], strict=True)
            )
            speeds = (packed / matmul_us / 1e3, cold / read_us / 1e3, share, 2 * m * n * k / whole_us / 1e3)
            vllm_us, torch_us = others_us
            yield Row(n, k, m, groups, whole_us, matmul_us, vllm_us, torch_us, *speeds)


def measure_reads(shapes: Sequence[tuple[int, int, int]], budget: float) -> Iterator[dict[str, float]]:
    """Time the GEMM at one token in turn with plain reads; nothing else evicts its tables from the caches.

    `read_share` is relative to a long read, `short_read_share` to a read of as many bytes as the weight, which pays
    for starting threads and memory as often as the GEMM does.
    """
    cold = 3 * last_level_cache()
    read = read_step(cold)
    for n, k, preferred in shapes:
        weights = Weights(LayerSpec(n, k, *choose_rotation(k, preferred), rank=RANK), cold, peers=False)
        matmul = weights.steps(torch.randn(1, k).bfloat16())[1]
        short_read = short_read_step(n * k // 8, cold)
        reads, times, shorts = time_in_turn((read, matmul, short_read), budget)
        share = statistics.median(n * k / 8 / cold * a / b for a, b in zip(reads, times, strict=True))
        row = {"n": n, "k": k, "m": 1, "bwla_matmul_us": statistics.median(times), "read_share": share}
        row["read_gbps"] = cold / statistics.median(reads) / 1e3
        row["short_read_share"] = statistics.median(a / b for a, b in zip(shorts, times, strict=True))
        print(row, flush=True)
        yield row


def show(rows: Sequence[Row]) -> None:
    """Print the rows as a table, with ratios."""
    table = Table(title="microseconds (medians); ratios against vLLM's bf16")
    for heading in (
        "N x K",
        "M",
        "BWLA",
        "matmul",
        "vLLM bf16",
        "torch bf16",
        "ratio",
        "matmul ratio",
        "packed / read GB/s",
        "share of read",
        "GOPS",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.n}x{row.k}", str(row.m),
            *(f"{us:.0f}" for us in (row.bwla_us, row.bwla_matmul_us, row.vllm_bf16_us, row.torch_bf16_us)),
            f"{row.vllm_bf16_us / row.bwla_us:.2f}", f"{row.vllm_bf16_us / row.bwla_matmul_us:.2f}",
            f"{row.packed_gbps:.1f} / {row.read_gbps:.1f}", f"{row.read_share:.2f}",
            f"{row.bwla_gops:.0f}",
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(SHAPES), help=f"Qwen3 shapes ({','.join(SHAPES)})")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="values of M (1,4,16,128,512)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for one shape and M (4)")
    parser.add_argument("--quick", action="store_true", help="two shapes, less than a minute")
    parser.add_argument(
        "--reads", action="store_true", help="compare only the GEMM at M = 1 with plain reads"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    if unknown := set(arguments.models.split(",")) - set(SHAPES):
        parser.error(f"--models: expected some of {', '.join(SHAPES)}, found {', '.join(sorted(unknown))}")
    shapes = QUICK if arguments.quick else [s for name in arguments.models.split(",") for s in SHAPES[name]]
    if arguments.reads:
        reads = list(measure_reads(shapes, arguments.seconds))
        if arguments.out:
            write_result(arguments.out, reads, threads=torch.get_num_threads())
        return 0
    rows = []
    for row in measure(
        shapes, [int(m) for m in arguments.tokens.split(",")], 1.0 if arguments.quick else arguments.seconds
    ):
        rows.append(row)
        print(
            f"{row.n}x{row.k} M={row.m}: {row.bwla_us:.0f} us, {row.vllm_bf16_us / row.bwla_us:.2f}x vLLM bf16",
            flush=True,
        )
    show(rows)
    if arguments.out:
        write_result(arguments.out, [vars(row) for row in rows], threads=torch.get_num_threads(), rank=RANK)
    return 0


if __name__ == "__main__":
    sys.exit(main())

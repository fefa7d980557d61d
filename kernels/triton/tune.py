"""Measure the matmul's configurations on this GPU and write the table that `tuning.select_config` reads.

    python -m bwla_kernels.triton.tune --out FILE [--shapes 51200x5120/1,...] [--tokens 1,4,64,...]

A shape is NxK/G with G rotation groups, or NxK/G/P for a weight of P binary planes.

Two rounds for each shape and number of tokens: a few cuts that should fill the GPU, then variations of the two
fastest. Each candidate is compared with float64 on a sample of rows, then timed in a CUDA graph over more weights
than the second-level cache holds. One that fails or is wrong is recorded in FILE's `.jsonl` and left out. The table
keeps the architecture's defaults, adds the exact shapes, and is written after each of them.
"""

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from bwla_kernels.factorize import PACK_FACTOR
from bwla_kernels.triton.binary_matmul import MAX_SPLIT_TILES, Weights, binary_matmul
from bwla_kernels.triton.layout import ChunkLayout, chunk_layout, pack_planes, repack_weights, unpack_weights
from bwla_kernels.triton.prepare_config import PLANES_MAX_TOKENS
from bwla_kernels.triton.prepare_input import QuantizedInput
from bwla_kernels.triton.tuning import (
    BINARY,
    BINARY_MAX_TOKENS,
    INTEGER,
    SPLITS,
    MatmulConfig,
    as_entry,
    binary_is_native,
    for_planes,
    load_table,
    parse_shape,
    shape_key,
    table_arch,
    token_limit,
)
from torch import Tensor

SHAPES = (
    "10240x5120/1,5120x8192/8,51200x5120/1,5120x25600/8,"  # Qwen3-32B: qkv, o, gate_up, down
    "6144x4096/1,4096x4096/8,24576x4096/1,4096x12288/8"  # Qwen3-8B
)
TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
BITS, RANK = 6, 32
REPLAYS = 10
COLD_BYTES = 256 << 20
"""Weights in a round of measurements: several times a second-level cache."""

MOST_FIRST, VARIED = 16, 2
"""Candidates of the first round, and how many of them the second one varies."""

IN_FLIGHT = 48 << 10
"""Bytes of weights that a multiprocessor should have in flight to hide the memory latency, with some reserve."""

SAMPLE = 128
"""Rows and tokens at each end of the product that are compared."""

LARGEST_ERROR = 1e-5
"""Of the float32 sums, relative to the largest output; rounding to the output's dtype comes on top. A single wrong
sign still shows: it changes most outputs by several hundredths of themselves."""


@dataclass(frozen=True)
class Problem:
    """The inputs of the candidates, and part of the expected output.

    Attributes:
        prepared: m random tokens.
        weights: copies of random weights that no cache holds together.
        tokens, rows: indices of the sampled outputs.
        expected: float64 [tokens, rows].
        dtype: of the output.
    """

    prepared: QuantizedInput
    weights: list[Weights]
    tokens: Tensor
    rows: Tensor
    expected: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Finding:
    """The result of a candidate: its microseconds, or its error."""

    config: MatmulConfig
    microseconds: float | None = None
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """Return the finding as a row of the .jsonl record."""
        columns = {"config": str(self.config), **asdict(self.config), "us": self.microseconds}
        return columns | {"ok": self.error is None, **({"error": self.error} if self.error else {})}


def candidates(
    layout: ChunkLayout, m: int, capability: tuple[int, int], multiprocessors: int
) -> list[MatmulConfig]:
    """Return the first round for m tokens, most promising first: at most 16, or 32 if both kernels are candidates."""
    tokens = token_limit(m)
    found = []
    if tokens <= PLANES_MAX_TOKENS and binary_is_native(capability):
        found += _binary(layout, tokens, multiprocessors)
        if tokens <= BINARY_MAX_TOKENS:
            return found
    if tokens <= 64:
        found += _skinny(layout, tokens, capability, multiprocessors)
    if tokens >= 64:
        found += _tiled(layout, tokens)
    return found


def _binary(layout: ChunkLayout, tokens: int, multiprocessors: int) -> list[MatmulConfig]:
    """Return tiles with about one program per multiprocessor or more, those with about IN_FLIGHT bytes first."""

    def distance(config: MatmulConfig) -> float:
        # Fragments of 16 rows by 512 columns are 1 KiB.
        fragments = layout.rows // 16 * layout.planes * config.k_warps * config.unroll
        return abs(math.log2(fragments * 1024 / multiprocessors / IN_FLIGHT))

    tiles = [n for n in (16, 32, 64, 128) if 0.7 <= layout.rows // n / multiprocessors <= 26]
    found = []
    for rows in tiles or (16,):
        for warps, k_warps in ((2, 2), (4, 4), (4, 2), (8, 8), (8, 4)):
            r = rows * k_warps // (16 * warps)
            for unroll in (1, 2, 4):
                most = 4 if tokens <= BINARY_MAX_TOKENS else 2
                if r >= 1 and (r * unroll * layout.planes <= most or r * unroll == 1):
                    config = MatmulConfig(BINARY, tokens, rows, warps, k_warps=k_warps, unroll=unroll)
                    found.append(replace(config, max_registers=255))
    return sorted(found, key=distance)[:MOST_FIRST]


def _skinny(
    layout: ChunkLayout, tokens: int, capability: tuple[int, int], multiprocessors: int
) -> list[MatmulConfig]:
    """Return splits of the columns for integer tensor cores that give one to five programs per multiprocessor."""
    least = 16 if capability[0] == 9 else 8  # eight columns are no wgmma
    found = []
    for one_plane in (128, 64, 256):
        rows = for_planes(MatmulConfig(INTEGER, least, one_plane, 4), layout.planes).block_n
        if layout.rows % rows:
            continue
        allowed = [split for split in SPLITS if split == 1 or layout.chunks >= 2 * split]
        useful = [s for s in allowed if 1 <= layout.rows // rows * s / multiprocessors <= 5] or allowed[-1:]
        for split in useful:
            for warps in (4, 8) if one_plane > 64 else (4,):
                found.append(MatmulConfig(INTEGER, max(least, tokens), rows, warps, 4, split))
    return list(dict.fromkeys(found))[:MOST_FIRST]


def _tiled(layout: ChunkLayout, tokens: int) -> list[MatmulConfig]:
    """Return tiles for many tokens that divide the rows."""
    cuts = (
        (256, 128, 8),
        (128, 128, 8),
        (128, 256, 8),
        (256, 64, 8),
        (128, 64, 4),
        (128, 128, 4),
        (128, 64, 8),
    )
    found = [
        for_planes(MatmulConfig(INTEGER, columns, rows, warps, 3), layout.planes)
        for rows, columns, warps in cuts
    ]
    fitting = [config for config in found if layout.rows % config.block_n == 0 and config.block_m <= tokens]
    return list(dict.fromkeys(fitting))


def variations(config: MatmulConfig) -> list[MatmulConfig]:
    """Return the second round around a fast configuration: other loads in flight, another limit on registers."""
    if config.kernel == BINARY:
        row_warps = config.num_warps // config.k_warps
        fragments = config.block_n // (16 * row_warps)
        unrolls = [u for u in (config.unroll // 2, 2 * config.unroll) if u >= 1 and u * fragments <= 8]
        found = [replace(config, unroll=unroll) for unroll in unrolls]
    else:
        found = [replace(config, num_stages=stages) for stages in (2, 3, 4, 6) if stages != config.num_stages]
    return [*found, replace(config, max_registers=0 if config.max_registers else 255)]


def draw(
    layout: ChunkLayout,
    m: int,
    device: torch.device,
    cold: int = COLD_BYTES,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Draw random activations and weights, and compute part of the product in float64.

    The operands of the low-rank term are bfloat16 numbers: its products are exact on any unit, so that a single wrong
    sign is detected.
    """
    generator = torch.Generator(device).manual_seed(0)
    width = layout.groups * layout.group_width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16()

    q = torch.randint(-31, 32, (m, width), dtype=torch.int8, device=device, generator=generator)
    q_sum = q.unflatten(1, (layout.groups, layout.group_width)).sum(-1, dtype=torch.int32)
    scale = torch.rand(m, layout.groups, device=device, generator=generator)
    u = normal(m, RANK).float()
    planes = pack_planes(q, BITS, layout) if m <= PLANES_MAX_TOKENS else None
    low_b = normal(layout.rows, RANK)
    row = (layout.out_features, layout.planes)[: 1 if layout.planes == 1 else 2]
    alpha = torch.rand(*row, device=device, generator=generator)
    counters = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)
    copies = max(1, min(64, cold // math.prod(layout.shape)))
    words = *row, width // PACK_FACTOR

    def weight() -> Tensor:  # repacked, because the padding of a rotation group must be zeros
        signs = torch.randint(-(2**31), 2**31, words, device=device, generator=generator)
        return repack_weights(signs.int(), layout)

    packed = [weight() for _ in range(copies)]
    weights = [Weights(part, alpha, low_b, None, counters, layout) for part in packed]
    rows, tokens = _ends(layout.out_features, device), _ends(m, device)
    signs = unpack_weights(packed[0], layout, rows).double()
    sampled = torch.einsum("npk,np->nk", signs, alpha.view(-1, layout.planes)[rows].double())
    x_hat = q[tokens].double() * scale[tokens].double().repeat_interleave(layout.group_width, 1)
    expected = x_hat @ sampled.t()
    expected += u[tokens].double() @ low_b[rows].double().t()
    return Problem(QuantizedInput(q, scale, q_sum, u, planes), weights, tokens, rows, expected, dtype)


def _ends(count: int, device: torch.device) -> Tensor:
    """Return the first and the last SAMPLE of `count` indices."""
    first = torch.arange(min(count, SAMPLE), device=device)
    return torch.cat([first, torch.arange(max(len(first), count - SAMPLE), count, device=device)])


def microseconds(problem: Problem, config: MatmulConfig) -> float:
    """Measure one call with cold weights, launched from a CUDA graph; the best of three rounds."""
    prepared, weights = problem.prepared, problem.weights
    binary_matmul(prepared, weights[0], BITS, config, problem.dtype)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in weights:
            binary_matmul(prepared, copy, BITS, config, problem.dtype)
    best = float("inf")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / (REPLAYS * len(weights)))
    return best


def try_config(
    problem: Problem, config: MatmulConfig, timer: Callable[[Problem, MatmulConfig], float] = microseconds
) -> Finding:
    """Check a configuration, then time it; exceptions become the finding's error."""
    try:
        y = binary_matmul(problem.prepared, problem.weights[0], BITS, config, problem.dtype)
        error = (y[problem.tokens][:, problem.rows].double() - problem.expected).abs()
        magnitude = problem.expected.abs()
        allowed = LARGEST_ERROR * magnitude.max() + torch.finfo(problem.dtype).eps * magnitude
        if not (error <= allowed).all():  # NaN is not
            worst = (error.max() / magnitude.max()).item()
            return Finding(config, error=f"wrong by up to {worst:.1e} of the largest output")
        return Finding(config, timer(problem, config))
    except Exception as error:  # a candidate's failure of any kind must not end the run
        last = traceback.format_exception_only(error)[-1].strip()
        return Finding(config, error=last[:400])


def fastest(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings without errors, fastest first."""
    return sorted((f for f in findings if f.microseconds is not None), key=lambda f: f.microseconds or 0.0)


def second_round(findings: Sequence[Finding]) -> list[MatmulConfig]:
    """Return variations of the fastest of the first round that were not part of it."""
    tried = {finding.config for finding in findings}
    varied = [config for finding in fastest(findings)[:VARIED] for config in variations(finding.config)]
    return [config for config in dict.fromkeys(varied) if config not in tried]


def measure(
    layout: ChunkLayout, m: int, device: torch.device, done: Sequence[Finding] = ()
) -> Iterator[Finding]:
    """Run both rounds for m tokens and yield a finding for each candidate that is not in `done`."""
    known = {finding.config: finding for finding in done}
    problem = draw(layout, m, device)
    properties = torch.cuda.get_device_properties(device)
    first = candidates(layout, m, (properties.major, properties.minor), properties.multi_processor_count)
    findings = []
    for config in first:
        finding = known.get(config) or try_config(problem, config)
        findings.append(finding)
        if config not in known:
            yield finding
    for config in second_round(findings):
        if config not in known:
            yield try_config(problem, config)


def read_findings(path: Path) -> dict[tuple[str, int], list[Finding]]:
    """Read the record of an earlier run: findings by shape and number of tokens; truncated lines are skipped."""
    findings: dict[tuple[str, int], list[Finding]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        config = MatmulConfig(**{name: row[name] for name in MatmulConfig.__dataclass_fields__})
        findings.setdefault((row["shape"], row["m"]), []).append(Finding(config, row["us"], row.get("error")))
    return findings


def new_table(name: str, arch: str) -> dict[str, Any]:
    """Copy the package's table, and record the origin of its shapes for `arch`."""
    table: dict[str, Any] = json.loads(json.dumps(load_table()))
    table["origin"] = (
        f"defaults hand-chosen from compiled code; shapes of sm_{arch} measured on {name}, "
        f"Triton {triton.__version__}, torch {torch.__version__}"
    )
    return table


def enter(
    table: dict[str, Any], arch: str, shape: tuple[int, int, int, int], m: int, config: MatmulConfig
) -> None:
    """Enter a measured configuration of a shape (N, K, G, P) into a table."""
    rows = table["architectures"][arch]["shapes"].setdefault(shape_key(*shape), {})
    rows[str(token_limit(m))] = as_entry(config)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bwla_kernels.triton.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the table to write (see tuning.json)")
    parser.add_argument("--shapes", default=SHAPES, help="NxK/G or NxK/G/P, comma-separated")
    parser.add_argument("--tokens", default=TOKENS, help="numbers of tokens, comma-separated powers of two")
    parser.add_argument("--resume", action="store_true", help="continue after the last line of the .jsonl")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: no NVIDIA GPU found: run it on the machine that will serve", file=sys.stderr)
        return 2
    device, log = torch.device("cuda"), options.out.with_suffix(".jsonl")
    if not options.resume:
        log.unlink(missing_ok=True)
    arch = table_arch(torch.cuda.get_device_capability(device))
    table, known = new_table(torch.cuda.get_device_name(device), arch), read_findings(log)
    for text in options.shapes.split(","):
        n, k, g, planes = parse_shape(text)
        for m in (int(part) for part in options.tokens.split(",")):
            findings = known.get((text, m), [])
            for finding in measure(chunk_layout(n, g, k // g, planes), m, device, tuple(findings)):
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"shape": text, "m": m, **finding.row()}) + "\n")
                if finding.error is not None:
                    print(f"  {finding.config}: left out: {finding.error}", flush=True)
                    _restart_if_lost(device, sys.argv[1:] if arguments is None else arguments)
                findings = [*findings, finding]
            for best in fastest(findings)[:1]:
                time = best.microseconds or math.inf
                enter(table, arch, (n, k, g, planes), m, best.config)
                print(
                    f"{text} m={m}: {best.config}, {time:.2f} us, {planes * n * k / 8 / time / 1e6:.2f} TB/s of "
                    f"packed weights, {2 * m * planes * n * k / time / 1e6:.0f} TOPS",
                    flush=True,
                )
                options.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


def _restart_if_lost(device: torch.device, arguments: Sequence[str]) -> None:
    """Continue in a new process if a kernel's failure has made the GPU unusable in this one."""
    try:
        torch.cuda.synchronize(device)
    except Exception:  # CUDA raises various errors then, and nothing more runs in this process
        words = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
        os.execv(sys.executable, [sys.executable, "-m", "bwla_kernels.triton.tune", *words])


if __name__ == "__main__":
    sys.exit(main())

"""Measure the matmul's configurations on this GPU and write the table that `tuning.select_config` reads.

    python -m bwla_kernels.triton.tune --out FILE [--shapes 51200x5120/1,...] [--tokens 1,4,64,...]

Each candidate is first compared with the first one's output, then timed in a CUDA graph over as many copies of the
weights as the second-level cache cannot hold. The file keeps the architecture's defaults and adds the exact shapes.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from bwla_kernels.errors import BackendError
from bwla_kernels.triton.binary_matmul import Activations, Weights, binary_matmul
from bwla_kernels.triton.layout import ChunkLayout, chunk_layout, pack_planes
from bwla_kernels.triton.tuning import (
    BINARY,
    INTEGER,
    MatmulConfig,
    as_entry,
    binary_is_native,
    load_table,
    shape_key,
    table_arch,
    token_limit,
)

SHAPES = (
    "6144x4096/1,4096x4096/8,24576x4096/1,4096x12288/8,"  # Qwen3-8B: qkv, o, gate_up, down
    "10240x5120/1,5120x8192/8,51200x5120/1,5120x25600/8"  # Qwen3-32B
)
TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
BITS = 6
REPLAYS = 10
COLD_BYTES = 256 << 20
"""Weights in a round of measurements: several times a second-level cache."""


def candidates(layout: ChunkLayout, m: int, capability: tuple[int, int]) -> Iterator[MatmulConfig]:
    """Configurations worth measuring for m tokens."""
    tokens = token_limit(m)
    if tokens <= 8 and binary_is_native(capability):
        for rows in (16, 32, 64, 128):
            for warps, k_warps in ((1, 1), (2, 2), (4, 4), (4, 2), (8, 8), (8, 4)):
                r = rows * k_warps // (16 * warps)
                if 1 <= r <= (2 if tokens == 8 else 4):
                    for limit in (0, 255):
                        yield MatmulConfig(BINARY, tokens, rows, warps, k_warps=k_warps, max_registers=limit)
    if tokens <= 64:
        for rows in (64, 128, 256):
            for warps in (2, 4, 8):
                for stages in (3, 4, 6):
                    for split in (1, 2, 4, 8, 16):
                        if layout.rows % rows == 0 and layout.chunks >= 2 * split:
                            yield MatmulConfig(INTEGER, max(8, tokens), rows, warps, stages, split)
    if tokens >= 64:
        for rows, columns, warps in (
            (256, 128, 8),
            (256, 64, 8),
            (128, 256, 8),
            (128, 128, 8),
            (128, 128, 4),
            (128, 64, 4),
            (128, 64, 8),
        ):
            for stages in (2, 3, 4):
                if layout.rows % rows == 0 and columns <= tokens:
                    yield MatmulConfig(INTEGER, columns, rows, warps, stages)


def draw(layout: ChunkLayout, m: int, device: torch.device) -> tuple[Activations, list[Weights]]:
    """Random activations, and copies of random weights that no cache holds together."""
    width = layout.blocks * layout.block_width
    q = torch.randint(-31, 32, (m, width), dtype=torch.int8, device=device)
    q_sum = q.unflatten(1, (layout.blocks, layout.block_width)).sum(-1, dtype=torch.int32)
    scale = torch.rand(m, layout.blocks, device=device)
    u = torch.randn(m, 16, device=device)
    planes = pack_planes(q, BITS, layout) if m <= 8 else None
    size = layout.shape[0] * layout.shape[1] * layout.shape[2]
    copies = max(1, min(64, COLD_BYTES // size))
    low_b = torch.randn(layout.rows, 16, dtype=torch.bfloat16, device=device)
    alpha = torch.rand(layout.out_features, device=device)
    counters = torch.zeros(4096, dtype=torch.int32, device=device)
    weights = [
        Weights(
            torch.randint(0, 256, layout.shape, dtype=torch.uint8, device=device),
            alpha,
            low_b,
            None,
            counters,
            layout,
        )
        for _ in range(copies)
    ]
    return Activations(q, scale, q_sum, u, planes), weights


def microseconds(activations: Activations, weights: list[Weights], config: MatmulConfig) -> float:
    """Time of one call with cold weights, launches in a CUDA graph; the best of three rounds."""
    binary_matmul(activations, weights[0], BITS, config, torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in weights:
            binary_matmul(activations, copy, BITS, config, torch.bfloat16)
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


def measure(layout: ChunkLayout, m: int, device: torch.device) -> tuple[MatmulConfig, float] | None:
    """The fastest sound configuration and its microseconds; None where none ran."""
    activations, weights = draw(layout, m, device)
    best: tuple[MatmulConfig, float] | None = None
    first: torch.Tensor | None = None
    for config in candidates(layout, m, torch.cuda.get_device_capability(device)):
        try:
            y = binary_matmul(activations, weights[0], BITS, config, torch.float32)
            first = y if first is None else first
            if not torch.allclose(y, first, rtol=1e-4, atol=1e-3 * first.abs().max().item()):
                raise BackendError(f"{config} disagrees with the first configuration on {layout}")
            time = microseconds(activations, weights, config)
        except (triton.OutOfResources, triton.CompilationError) as error:
            print(f"  {config}: left out ({type(error).__name__})")
            continue
        if best is None or time < best[1]:
            best = (config, time)
    return best


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bwla_kernels.triton.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the table to write (see tuning.json)")
    parser.add_argument("--shapes", default=SHAPES, help="NxK/G, comma-separated")
    parser.add_argument("--tokens", default=TOKENS, help="numbers of tokens, comma-separated powers of two")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: no NVIDIA GPU found: run it on the machine that will serve", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    arch = table_arch(torch.cuda.get_device_capability(device))
    table = json.loads(json.dumps(load_table()))
    name = torch.cuda.get_device_name(device)
    table["origin"] = (
        f"defaults hand-chosen from compiled code; shapes of sm_{arch} measured on {name}, "
        f"Triton {triton.__version__}, torch {torch.__version__}"
    )
    for text in options.shapes.split(","):
        n, k, g = (int(part) for part in text.replace("/", "x").split("x"))
        layout = chunk_layout(n, g, k // g)
        rows = table["architectures"][arch]["shapes"].setdefault(shape_key(n, k, g), {})
        for m in (int(part) for part in options.tokens.split(",")):
            found = measure(layout, m, device)
            if found is None:
                continue
            config, time = found
            rows[str(token_limit(m))] = as_entry(config)
            packed = n * k / 8 / time / 1e6
            print(
                f"{text} m={m}: {config}, {time:.2f} us, {packed:.2f} TB/s of packed weights, "
                f"{2 * m * n * k / time / 1e6:.0f} TOPS",
                flush=True,
            )
            options.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

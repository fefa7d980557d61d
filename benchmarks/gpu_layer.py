"""One BWLA layer on a GPU against cuBLAS bf16, Humming, GemLite and Marlin int4, in CUDA graphs with cold caches.

    python benchmarks/gpu_layer.py --out benchmarks/results/gpu_layer.json

A graph holds one call for each of several copies of the weights, together larger than four times the second-level
cache; a figure is the median time of a replay over the calls in it. Whole layers: every method quantizes its own
activations, and BWLA also rotates them and adds its low-rank part. `bwla_matmul` is the weight side alone.
Methods that are not installed are named and left out.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bwla_converter.dummy import random_layer
from bwla_kernels import ops
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from cpu_layer import SHAPES
from gpu_peers import PEERS, Layer
from record import write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 8192)
RANK = 16
REPLAYS = 15
Row = dict[str, Any]


def copies_for(bits: float, n: int, k: int) -> int:
    """Copies of a weight that together exceed four times the second-level cache, at most 64."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return int(max(2, min(64, -(-4 * cache // int(n * k * bits / 8)))))


def microseconds(layers: Sequence[Layer], x: Tensor) -> float:
    """Median time of a call, in a CUDA graph of one call each."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in layers[:2]:
            layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [layer(x) for layer in layers]
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(layers))
    del kept
    return statistics.median(times)


def bwla_layers(spec: LayerSpec) -> tuple[list[Layer], Callable[[Tensor], list[Layer]]]:
    """Copies of the layer, and for an x copies of its weight side alone."""
    from bwla_kernels.triton.binary_matmul import Activations, binary_matmul, weights_of
    from bwla_kernels.triton.prepare_input import prepare_input
    from bwla_kernels.triton.tuning import BINARY, select_config

    device = torch.device("cuda")
    stored = {name: t.to(device) for name, t in random_layer(spec, torch.Generator().manual_seed(0)).items()}
    backend, reason = ops.select_backend(spec, device, "triton")
    print(f"{spec.out_features}x{spec.in_features}: {reason}")
    first = backend.prepare(stored, spec)
    tensors = [first]
    for _ in range(copies_for(1, spec.out_features, spec.in_features) - 1):
        tensors.append({name: tensor.clone() for name, tensor in first.items()})

    def layer_of(own: dict[str, Tensor]) -> Layer:
        return lambda x: backend.apply(x, own, spec)

    def weight_sides(x: Tensor) -> list[Layer]:
        properties = torch.cuda.get_device_properties(device)
        layout = weights_of(first, spec).layout
        config = select_config(
            *(spec.out_features, spec.in_features, spec.blocks, layout.chunk, len(x), spec.bits),
            (properties.major, properties.minor),
            properties.multi_processor_count,
        )
        made = prepare_input(x, first, spec, planes=config.kernel == BINARY, chunk=layout.chunk)
        given = Activations(made.q, made.scale, made.q_sum, made.u, made.planes)

        def side_of(own: dict[str, Tensor]) -> Layer:
            weights = weights_of(own, spec)
            return lambda x: binary_matmul(given, weights, spec.bits, config, x.dtype)

        return [side_of(own) for own in tensors]

    return [layer_of(own) for own in tensors], weight_sides


def measure_shape(n: int, k: int, wished: int, tokens: Sequence[int], end: float) -> Iterator[Row]:
    """Rows of one shape, until `end` on the monotonic clock."""
    spec = LayerSpec(n, k, *choose_rotation(k, wished), rank=RANK)
    xs = {m: torch.randn(m, k, dtype=torch.bfloat16, device="cuda") for m in tokens}
    found: dict[int, Row] = {m: {"n": n, "k": k, "m": m, "blocks": spec.blocks} for m in tokens}
    layers, weight_sides = bwla_layers(spec)
    for m in tokens:
        found[m]["bwla_us"] = microseconds(layers, xs[m])
        found[m]["bwla_matmul_us"] = microseconds(weight_sides(xs[m]), xs[m])
    del layers, weight_sides
    for peer in PEERS:
        if time.monotonic() > end:
            print(f"{n}x{k} {peer.name}: not measured: no time left")
            continue
        try:
            others = [peer.make(n, k) for _ in range(copies_for(peer.bits, n, k))]
            for m in tokens:
                found[m][f"{peer.name}_us"] = microseconds(others, xs[m])
            del others
        except Exception as error:  # a peer's own failure, of any kind, must not end the run
            print(f"{n}x{k} {peer.name}: not measured: {type(error).__name__}: {error}")
        torch.cuda.empty_cache()
    for m, row in found.items():
        row["packed_tb_s"] = n * k / 8 / row["bwla_matmul_us"] / 1e6
        row["bwla_tops"] = 2 * m * n * k / row["bwla_us"] / 1e6
        yield row


def copy_tb_s() -> float:
    """Bandwidth of a plain copy, read and written bytes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda x: target.copy_(source)] * 4, source[:1]) / 1e6


def show(rows: Sequence[Row]) -> None:
    """Print the rows with BWLA's ratios."""
    names = [peer.name for peer in PEERS]
    table = Table(title="microseconds; BWLA's ratio to each method")
    for heading in ("N x K", "M", "BWLA", "matmul", "TB/s", "TOPS", *names):
        table.add_column(heading, justify="right")
    for row in rows:
        others = [row.get(f"{name}_us") for name in names]
        table.add_row(
            f"{row['n']}x{row['k']}",
            str(row["m"]),
            f"{row['bwla_us']:.1f}",
            f"{row['bwla_matmul_us']:.1f}",
            f"{row['packed_tb_s']:.2f}",
            f"{row['bwla_tops']:.0f}",
            *(f"{us:.1f} ({us / row['bwla_us']:.2f}x)" if us else "-" for us in others),
        )
    Console(width=140).print(table)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="32b,8b", help="Qwen3 shapes (32b,8b)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="values of M")
    parser.add_argument("--minutes", type=float, default=9.0, help="time after which no method is begun (9)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, found none: see cpu_layer.py for the CPU")
    from gpu_rates import rates

    end = time.monotonic() + 60 * arguments.minutes
    facts = {"copy_tb_s": copy_tb_s(), **rates()}
    print(facts, flush=True)
    rows: list[Row] = []
    for name in arguments.models.split(","):
        for n, k, wished in SHAPES[name]:
            if time.monotonic() > end:
                print(f"{n}x{k}: not measured: no time left")
                continue
            rows += measure_shape(n, k, wished, [int(m) for m in arguments.tokens.split(",")], end)
            if arguments.out:
                write_result(arguments.out, rows, **facts)
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time a layer with scales for groups of columns on this machine's CPU, beside one with a single scale for each row.

    python -m benchmarks.kernels.cpu_groups --out benchmarks/results/cpu_groups.json
    python -m benchmarks.kernels.cpu_groups --shapes 4096x4096 --groups 128

All layers are timed in turn for many rounds, as in `cpu_layer`, on copies of their weights that exceed the last-level
cache together. `row` is the layer with one scale for each row and no rotation, `rotated` the one that `bwla-convert`
makes of ordinary models, of rank 0. Figures are medians; a ratio is the median of the ratios within each round.
"""

import argparse
import statistics
from collections.abc import Sequence
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from bwla_converter.checkpoint.dummy import random_layer
from bwla_kernels import ops
from bwla_kernels.cpu import linear as kernel
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from torch import Tensor

from benchmarks.common.record import write_result
from benchmarks.kernels.cpu_layer import Step, copies, last_level_cache, time_in_turn

SHAPES = "10240x5120,4096x12288,6144x2048"
GROUPS = "256,128,64,32"


def step_of(spec: LayerSpec, x: Tensor, cold: int) -> Step:
    """Return a call of a layer whose weights are not in the cache."""
    backend, _ = ops.select_backend(spec, torch.device("cpu"), "cpu")
    packed = copies(kernel.pack(random_layer(spec, torch.Generator().manual_seed(0)), spec), cold)
    return lambda i: backend.apply(x, {"packed": packed[i % len(packed)]}, spec)


def measure(
    rows: int, columns: int, tokens: int, bits: int, groups: Sequence[int], budget: float
) -> list[dict[str, Any]]:
    """Time the layers of one shape; return one row for each.

    Args:
        rows, columns: N and K.
        tokens: M.
        bits: of the activations.
        groups: columns of a group; those that do not divide K are left out.
        budget: seconds to measure for.
    """
    specs = {
        "row": LayerSpec(rows, columns, 1, 1, columns, bits=bits, grouped=True),
        "rotated": LayerSpec(rows, columns, *choose_rotation(columns, 1), bits=bits),
    }
    for size in groups:
        if columns % size == 0:
            spec = LayerSpec(rows, columns, columns // size, 1, size, bits=bits, grouped=True)
            specs[f"groups of {size}"] = spec
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    cold = 2 * last_level_cache()
    times = dict(
        zip(specs, time_in_turn([step_of(spec, x, cold) for spec in specs.values()], budget), strict=True)
    )
    return [
        {
            "n": rows,
            "k": columns,
            "m": tokens,
            "bits": bits,
            "layer": name,
            "us": round(statistics.median(each), 2),
            "to_row": round(statistics.median(map(truediv, each, times["row"])), 3),
            "to_rotated": round(statistics.median(map(truediv, each, times["rotated"])), 3),
        }
        for name, each in times.items()
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help=f"NxK, joined by commas ({SHAPES})")
    parser.add_argument("--tokens", default="1", help="numbers of tokens, joined by commas (1)")
    parser.add_argument("--abits", default="8", help="activation bits, joined by commas (8)")
    parser.add_argument("--groups", default=GROUPS, help=f"columns of a group, joined by commas ({GROUPS})")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each shape and number (10)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    groups, result = list(map(int, arguments.groups.split(","))), []
    for shape in arguments.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        for tokens in map(int, arguments.tokens.split(",")):
            for bits in map(int, arguments.abits.split(",")):
                for row in measure(rows, columns, tokens, bits, groups, arguments.seconds):
                    result.append(row)
                    print(row, flush=True)
    if arguments.out:
        write_result(arguments.out, result, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()

"""Time one BWLA layer with 1 to 4 binary planes on this machine's CPU, and vLLM's bf16 linear, side by side.

    python -m benchmarks.kernels.cpu_planes --out benchmarks/results/cpu_planes.json
    python -m benchmarks.kernels.cpu_planes --shapes 4096x4096 --tokens 1

All layers are timed in turn for many rounds, as in `cpu_layer`. Figures are medians; the ratio to one plane is the
median of the ratios within each round, since the speed of memory varies from second to second.
"""

import argparse
import statistics
from operator import truediv
from pathlib import Path

import torch
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import MAX_PLANES

from benchmarks.common.record import write_result
from benchmarks.kernels.cpu_layer import RANK, Weights, last_level_cache, time_in_turn

PLANES = range(1, MAX_PLANES + 1)
SHAPES, TOKENS = "10240x5120,4096x12288", "1,128"


def measure(rows: int, columns: int, tokens: int, budget: float, cold: int) -> list[dict[str, float]]:
    """Time the layers of one shape; return one row for each number of planes.

    Args:
        rows, columns: N and K.
        tokens: M.
        budget: seconds to measure for.
        cold: bytes that the copies of a layer's weights exceed together.
    """
    sizes = choose_rotation(columns, 1)
    specs = [LayerSpec(rows, columns, *sizes, rank=RANK, planes=planes) for planes in PLANES]
    weights = [Weights(spec, cold, peers=spec.planes == 1) for spec in specs]
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    steps = [layer_weights.steps(x)[0] for layer_weights in weights]
    *layers, bf16 = time_in_turn([*steps, weights[0].steps(x)[2]], budget)
    return [
        {
            "n": rows,
            "k": columns,
            "m": tokens,
            "planes": planes,
            "us": round(statistics.median(times), 2),
            "to_one_plane": round(statistics.median(map(truediv, times, layers[0])), 3),
            "vllm_bf16_us": round(statistics.median(bf16), 2),
            "bf16_to_bwla": round(statistics.median(map(truediv, bf16, times)), 2),
        }
        for planes, times in zip(PLANES, layers, strict=True)
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help=f"NxK, joined by commas ({SHAPES})")
    parser.add_argument("--tokens", default=TOKENS, help=f"numbers of tokens, joined by commas ({TOKENS})")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each shape and number (20)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    cold, result = 2 * last_level_cache(), []
    for shape in arguments.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        for tokens in map(int, arguments.tokens.split(",")):
            for row in measure(rows, columns, tokens, arguments.seconds, cold):
                result.append(row)
                print(row, flush=True)
    if arguments.out:
        write_result(arguments.out, result, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()

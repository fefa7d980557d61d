"""Time a BWLA layer, cuBLAS bf16, Humming, GemLite and Marlin int4 on a GPU, in CUDA graphs with cold caches.

    python -m benchmarks.kernels.gpu_layer --out benchmarks/results/gpu_layer.json
    python -m benchmarks.kernels.gpu_layer --quick --planes 1,2,4

A graph contains one call for each of several copies of the weights, which exceed the L2 cache four times; a figure is
the median time of a replay divided by its calls. Whole layers are timed: every method quantizes its activations, and
BWLA also rotates them, adds its low-rank correction and computes the norm or SiLU * mul before the layer (`fused_us`;
`plain_us` is without that operation, `separate_us` with it as a kernel of torch's compiler). BWLA's rows are those of
gpu_day.py's `layer` step, compared with float64 before they are timed. The result lists methods that are not installed
and cases that fail. --quick times BWLA and cuBLAS only and takes a minute.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.record import write_result
from benchmarks.kernels.gpu.checks import check
from benchmarks.kernels.gpu.journal import RESTART, Case, Journal, Row, run_cases
from benchmarks.kernels.gpu.layer_table import copy_bandwidth, measure, measure_method
from benchmarks.kernels.gpu.layers import Inputs, call, device_is_lost, make_inputs, make_layer, step_in_torch
from benchmarks.kernels.gpu.shapes import GPU, MODELS, PLAIN, Setting, Shape, with_planes
from benchmarks.kernels.gpu.timing import copies_for, time_calls
from benchmarks.kernels.gpu_peers import PEERS, Peer
from benchmarks.kernels.gpu_report import layer_lines

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 8192)
QUICK_TOKENS = (1, 8, 4096)
STEP = "layer"


def separate(row: Row, shape: Shape, m: int, setting: Setting) -> None:
    """Time the operation before a layer as one kernel of torch's compiler, followed by the plain layer."""
    layer = make_layer(shape.spec(), setting.device)
    inputs = make_inputs(shape.step, m, shape.k, setting.dtype, setting.device)
    if not check(shape.step, inputs, layer, row):
        return
    before: Callable[[str, Inputs], Tensor] = torch.compile(step_in_torch, dynamic=False)

    def run(tensors: dict[str, Tensor]) -> object:
        plain = Inputs(before(shape.step, inputs), inputs.norm_weight, inputs.residual)
        return call(PLAIN, plain, tensors, layer.spec)

    sets = layer.copies(copies_for(shape.packed_bytes, setting.device))
    time_calls([partial(run, tensors) for tensors in sets], setting.device).into(row, "separate")


def peer_case(row: Row, peer: Peer, shape: Shape, m: int, setting: Setting) -> None:
    """Time another method's layer."""
    row[f"{peer.name}_us"] = measure_method(peer.make, peer.bits, shape, m, setting)


def cases(
    models: Sequence[str], tokens: Sequence[int], peers: Sequence[Peer], setting: Setting
) -> list[Case]:
    """Return BWLA's cases, then those of the other methods."""
    found = []
    shapes = [(f"{model} {shape.name}", shape) for model in models for shape in MODELS[model].values()]
    for name, shape in shapes:
        for m in tokens:
            found.append(Case(f"{name} m={m}", partial(measure, shape, m, setting)))
    for peer in peers:
        for name, shape in shapes:
            for m in tokens if shape.planes == 1 else ():  # planes are BWLA's alone
                run = partial(peer_case, peer=peer, shape=shape, m=m, setting=setting)
                found.append(Case(f"{name} m={m} {peer.name}", run))
    for name, shape in shapes if peers else ():
        if shape.step:
            for m in tokens:
                run = partial(separate, shape=shape, m=m, setting=setting)
                found.append(Case(f"{name} m={m} separate", run))
    return found


def merged(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Return a row for each linear and number of tokens with all methods' times, and a list of what is missing."""
    found: dict[str, Row] = {}
    missing = []
    for row in rows:
        if "case" not in row:
            missing.append(f"no time left for {row.get('left_out')}")
            continue
        key, method = " ".join(row["case"].split()[:3]), row["case"].split()[3:]
        if not row.get("ok", True):
            missing.append(f"{row['case']}: {row.get('error', 'wrong')}")
        if not method:
            found[key] = dict(row)
        elif row.get("ok", True):
            times = {name: us for name, us in row.items() if name.endswith("_us")}
            found.setdefault(key, {"case": key}).update(times)
    return list(found.values()), missing


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="32b,8b", help="Qwen3 shapes (32b,8b)")
    parser.add_argument("--planes", default="1", help="numbers of binary planes of a weight, 1 to 4 (1)")
    parser.add_argument("--tokens", help=f"values of M ({','.join(map(str, TOKENS))})")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (9)")
    parser.add_argument(
        "--quick", action="store_true", help="only Qwen3-32B, three values of M, no other engines"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument(
        "--rows", type=Path, help=argparse.SUPPRESS
    )  # rows of this run before it lost its GPU
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, found none: see cpu_layer.py for the CPU")
    folder = arguments.rows or Path(tempfile.mkdtemp(prefix="gpu_layer_"))
    until = arguments.until or time.time() + 60 * arguments.minutes
    tokens = tuple(int(m) for m in arguments.tokens.split(",")) if arguments.tokens else TOKENS
    models, peers = arguments.models.split(","), [peer for peer in PEERS if peer.name != "cublas_bf16"]
    if arguments.quick:
        models, tokens, peers = ["32b"], QUICK_TOKENS, []
    planes = [int(number) for number in arguments.planes.split(",")]
    models = [with_planes(model, number) for number in planes for model in models]
    journal = Journal(folder, until)
    wanted = cases(models, tokens, peers, GPU)
    status = run_cases(journal, STEP, wanted, lambda: device_is_lost(GPU.device))
    if status == RESTART:
        words = [word for word in sys.argv[1:] if not word.startswith(("--rows=", "--until="))]
        words = ["-m", "benchmarks.kernels.gpu_layer", *words, f"--rows={folder}", f"--until={until}"]
        os.execv(sys.executable, [sys.executable, *words])
    rows, missing = merged(journal.rows(STEP))
    if arguments.out:
        write_result(arguments.out, rows, not_measured=missing, copy_tb_s=copy_bandwidth(GPU.device))
    print("\n".join([*layer_lines(rows), *missing]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Estimate the cost of a decode step on a GPU, kernel by kernel: launches, bytes, barriers, microseconds.

    python -m benchmarks.kernels.gpu_estimate [--measured benchmarks/results/gpu_day_h200.json]

Bytes follow from the sizes. Barriers are counted in Triton's code for sm_90, in all branches of a kernel, of which a
program executes about half. The expected time is a latency for each kernel plus its bytes at a share of the memory
bandwidth, which are constants below; measured times come from the result file of gpu_day.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bwla_kernels.factorize import RANK_STEP
from bwla_kernels.triton import fused_load, launch, matmul_cases, prepare_cases
from bwla_kernels.triton.compiling import CompileCase, compile_case
from bwla_kernels.triton.layout import layer_layout
from bwla_kernels.triton.matmul_cases import Variant
from bwla_kernels.triton.prepare_config import padded_rows, right_columns, select_few
from bwla_kernels.triton.tuning import select_config

from benchmarks.kernels.gpu.shapes import ADD_NORM, DECODER_LAYERS, MODELS, SILU_MUL, Shape

CAPABILITY, MULTIPROCESSORS = (9, 0), 132
FUSE = {ADD_NORM: fused_load.ADD_NORM, SILU_MUL: fused_load.SILU_MUL}

BANDWIDTH = 4.3
"""Read bandwidth of an H200 in TB/s."""

BEFORE = {"input": 4.0, "matmul": 1.5, "share": 0.80, "gap": 1.0}
AFTER = {"input": 3.0, "matmul": 1.0, "share": 0.90, "gap": 0.3}
"""Latency of a kernel in microseconds, share of BANDWIDTH, and gap after a launch: as estimated before the kernels ran
on a GPU (one program for each token and rotation group, launches in turn), and with several programs for each token,
prefetched loads and dependent launches."""


@dataclass(frozen=True)
class Cost:
    """A launch: the bytes that it must move, and the barriers in its code."""

    layer: str
    side: str
    bytes: int
    barriers: int

    def expected(self, constants: Mapping[str, float]) -> float:
        """Return the expected microseconds, including the gap after the launch."""
        moved = self.bytes / (constants["share"] * BANDWIDTH * 1e6)
        return constants[self.side] + moved + constants["gap"]


def input_bytes(shape: Shape) -> int:
    """Return the input transform's bytes for a token: input, residual, rotations, column scale, A, codes, planes."""
    spec = shape.spec()
    k, left, right = spec.in_features, padded_rows(spec.n1), right_columns(spec.n2)
    read = {ADD_NORM: 3, SILU_MUL: 2}.get(shape.step, 1) * 2 * k
    rotations = spec.rotation_groups * 4 * (left * left + right * right)
    written = k + k * spec.bits // 8 + 2 * 4 * k + (2 * k if shape.step == ADD_NORM else 0)
    return read + rotations + 4 * k + 2 * spec.rank * k + written


def matmul_bytes(shape: Shape) -> int:
    """Return the GEMM's bytes for a token: packed weights, row scales, padded B, planes, outputs."""
    spec = shape.spec()
    layout = layer_layout(spec)
    chunks, rows, width = layout.shape
    rank = -(-spec.rank // RANK_STEP) * RANK_STEP
    per_row = 4 * spec.planes + 2 * rank + 2
    return chunks * rows * width + layout.rows * per_row + spec.in_features * spec.bits // 8


def barriers(case: CompileCase) -> int:
    """Return the number of barrier instructions in a kernel's code for sm_90."""
    return compile_case(case, 90).instructions.get("BAR", 0)


def costs(model: str) -> Iterator[Cost]:
    """Return the eight launches of a decoder layer's linears."""
    for name, shape in MODELS[model].items():
        spec = shape.spec()
        layout = layer_layout(spec)
        few = prepare_cases.compile_case_of(
            *(spec, select_few(spec), 90, torch.bfloat16, FUSE.get(shape.step, fused_load.PLAIN)),
            *(layout.chunk, launch.EARLY),
        )
        yield Cost(name, "input", input_bytes(shape), barriers(few))
        sizes = (spec.out_features, spec.in_features, spec.rotation_groups, layout.chunk, 1, spec.bits)
        config = select_config(*sizes, CAPABILITY, MULTIPROCESSORS, spec.planes)
        case = matmul_cases.binary_case(config, layout, name, Variant(pdl=True))
        yield Cost(name, "matmul", matmul_bytes(shape), barriers(case))


def measured_layers(day: Mapping[str, Any], model: str) -> dict[tuple[str, str], float]:
    """Return (linear, launch) -> microseconds at one token, from the `layer` step's rows."""
    found = {}
    for row in day.get("rows", {}).get("layer", []):
        if row.get("model") == model and row.get("m") == 1 and row.get("ok"):
            found[row["layer"], "input"] = row["input_us"]
            found[row["layer"], "matmul"] = row["weight_us"]
    return found


def measured_chain(day: Mapping[str, Any], model: str) -> dict[str, float]:
    """Return kind of overlap -> microseconds of a decoder layer's linears, from the `chain` step's rows."""
    rows = day.get("rows", {}).get("chain", [])
    return {
        r["launches"]: r["layer_us"]
        for r in rows
        if r.get("model") == model and r.get("m") == 1 and "layer_us" in r
    }


def sheet(model: str, day: Mapping[str, Any]) -> Iterator[str]:
    """Yield a model's table in Markdown."""
    name, layers, found = (
        {"32b": "Qwen3-32B", "8b": "Qwen3-8B"}[model],
        DECODER_LAYERS[model],
        measured_layers(day, model),
    )
    yield f"## {name}, one token\n"
    yield "| linear | kernel | MB | barriers | expected before, us | expected now, us | measured, us |"
    yield "|---|---|---|---|---|---|---|"
    total = {"bytes": 0.0, "before": 0.0, "after": 0.0}
    for cost in costs(model):
        before, after = cost.expected(BEFORE), cost.expected(AFTER)
        total["bytes"] += cost.bytes
        total["before"] += before
        total["after"] += after
        time_us = found.get((cost.layer, cost.side))
        yield (
            f"| {cost.layer} | {cost.side} | {cost.bytes / 1e6:.2f} | {cost.barriers} | {before:.1f} | {after:.1f} | "
            f"{'unmeasured' if time_us is None else f'{time_us:.1f}'} |"
        )
    chain = measured_chain(day, model)
    chain_us = (
        f"{chain['early']:.1f} (in turn {chain['in turn']:.1f}, late {chain['late']:.1f})"
        if chain
        else "unmeasured"
    )
    yield (
        f"| all four | 8 launches | {total['bytes'] / 1e6:.1f} | "
        f"| {total['before']:.1f} | {total['after']:.1f} | {chain_us} |"
    )
    floor = total["bytes"] / BANDWIDTH / 1e6
    ends = " to ".join(f"{layers * total[when] / 1e3:.2f}" for when in ("before", "after"))
    yield f"\n{layers} layers: {layers * floor / 1e3:.2f} ms of memory traffic at {BANDWIDTH} TB/s; expected {ends} ms"
    yield (
        f"before and now; measured {layers * chain['early'] / 1e3:.2f} ms.\n"
        if chain
        else "before and now.\n"
    )


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measured", type=Path, help="result file of gpu_report.py --out")
    parser.add_argument("--out", type=Path, help="Markdown file to write (standard output)")
    arguments = parser.parse_args()
    day = json.loads(arguments.measured.read_text(encoding="utf-8")) if arguments.measured else {}
    machine = day.get("machine", {}).get("name")
    text = "\n".join(
        [
            "# Cost of a decode step on a GPU\n",
            "Written by `python -m benchmarks.kernels.gpu_estimate`, whose docstring explains the columns and the",
            "constants behind the expected times."
            + (
                f" Measured on {machine} with cold weights and dependent launches,"
                if machine
                else " Estimated,"
            ),
            "without attention. The time of one kernel comes from a graph that contains only its kind; the time of",
            'all four linears comes from a graph with the launches of a whole decoder layer ("in turn": without',
            'dependent launches; "late": each kernel starts the next one before its last step, instead of at its',
            "beginning).\n",
            *(line for model in ("32b", "8b") for line in sheet(model, day)),
        ]
    )
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

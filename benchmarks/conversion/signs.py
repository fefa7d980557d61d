"""Time the search for signs of recipe `fast` on a CPU: the compiled kernels beside the reference implementations.

    python -m benchmarks.conversion.signs --out benchmarks/results/signs.json

The work is that of one input group: all rounds of the recipe. The weight is Gaussian and the Hessian that of correlated
inputs. Both implementations run in turn on one thread; figures are the process's CPU seconds, the smallest of the
repetitions. The matrix products between the steps are the same library's in both. `error` is the kernels' summed output
error divided by the references', and `same` the share of equal signs.
"""

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bwla_converter.quantize.fast import FastOptions
from bwla_kernels.cpu import sign_steps
from bwla_kernels.sign_search import BinaryWeight, Metric, Target, gptq_binarize
from torch import Tensor

from benchmarks.common.record import write_result

SHAPES = ((960, 576), (3072, 576), (576, 1536), (512, 4096))
"""N and K. The first three are q, k, v; gate and up; and down of SmolLM2-135M."""


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return a weight [rows, columns] and a damped Hessian [columns, columns]."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(columns) + 0.7 * torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mix
    hessian = inputs.mT @ inputs / len(inputs)
    damping = 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    return torch.randn(rows, columns, generator=generator), hessian + damping


def search(weight: Tensor, hessian: Tensor) -> tuple[BinaryWeight, float]:
    """Run the rounds of one input group; return the last result and the CPU seconds of all."""
    metric = Metric.of(hessian)
    target = Target.of(weight, metric)
    started = time.process_time()
    for effort in FastOptions().efforts:
        result = gptq_binarize(target, metric, effort)
    return result, time.process_time() - started


def references() -> AbstractContextManager[Any]:
    """Return a context in which no compiled kernel can be used."""
    return mock.patch.object(sign_steps, "can_run", return_value=(False, "it is compared with the kernels"))


def measure(rows: int, columns: int, repeats: int) -> dict[str, Any]:
    """Time both implementations on one shape."""
    weight, hessian = problem(rows, columns)
    results: dict[str, BinaryWeight] = {}
    seconds: dict[str, list[float]] = {"kernel": [], "reference": []}
    for _ in range(repeats):
        for name, context in (("kernel", nullcontext), ("reference", references)):
            with context():
                results[name], took = search(weight, hessian)
            seconds[name].append(took)
    kernel, reference = min(seconds["kernel"]), min(seconds["reference"])
    return {
        "rows": rows,
        "columns": columns,
        "kernel_cpu_seconds": round(kernel, 3),
        "reference_cpu_seconds": round(reference, 3),
        "ratio": round(reference / kernel, 2),
        "same": round(float((results["kernel"].sign == results["reference"].sign).float().mean()), 6),
        "error": round(float(results["kernel"].error.sum() / results["reference"].error.sum()), 6),
    }


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    able, reason = sign_steps.can_run(torch.device("cpu"), 32)
    if not able:
        parser.error(f"the compiled kernel cannot be used: {reason}")
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        rows.append(measure(*shape, arguments.repeats))
        print(rows[-1], flush=True)
    if arguments.out:
        write_result(arguments.out, rows, kernel=reason)


if __name__ == "__main__":
    main()

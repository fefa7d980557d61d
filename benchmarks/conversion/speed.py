"""Measure seconds, CPU seconds and peak memory of conversions by recipe and phase, beside other libraries.

    python -m benchmarks.conversion.speed --out benchmarks/results/convert_speed.json \\
        --peer-python llmcompressor-gptq=PEERS/llmcompressor/bin/python \\
        --peer-python gptqmodel-gptq=PEERS/gptqmodel/bin/python --peer-python autoround-light=PEERS/autoround/bin/python
    python -m benchmarks.conversion.speed --quick

The other libraries quantize to 4 bits, which is less work, on the same calibration samples; each needs the Python of an
environment in which it is installed, see docs/benchmarks/speed.md. One that cannot run is listed under `unavailable` in
the result. Every conversion runs in a process of its own, `best` with one epoch of tuning and one of distillation.
Seconds include reading the model and exclude the start of the process; those of `bwla-convert` also include its checks,
its report and writing the checkpoint, which the others do not do here.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bwla_converter.calibration.text import calibration_samples
from bwla_converter.options import Calibration
from bwla_converter.source.model import Source, open_source
from safetensors.torch import save_file

from benchmarks.common.processes import RunError, add_method_options, choose_methods, peer_command, run
from benchmarks.common.real_models import MODELS as REAL_MODELS
from benchmarks.common.record import ROOT, write_result
from benchmarks.conversion.peers import PEERS
from benchmarks.conversion.speed_models import RANDOM_MODELS, make_model

RECIPES = ("data-free", "paper", "fast", "best")
BITS = 4
"""Code bits of the other libraries."""

GROUP_SIZES = (128, 64, 32)
QUICK_MODELS, QUICK_LAYERS = ("smollm2-135m",), 2
QUICK_SAMPLES, QUICK_LENGTH = 16, 256


@dataclass(frozen=True)
class Job:
    """What all methods do with one model.

    Attributes:
        name: name of the model in the result.
        source: the model.
        calibration: the calibration text.
        threads: threads that a process may use.
        folder: an empty folder for files of the conversions.
    """

    name: str
    source: Source
    calibration: Calibration
    threads: int
    folder: Path

    def row(self, method: str, tokens: int, measured: dict[str, Any]) -> dict[str, Any]:
        """Return a row of the result."""
        names = [
            name for index in range(self.source.num_layers) for name in self.source.linears_of_layer(index)
        ]
        return {
            "model": self.name,
            "layers": self.source.num_layers,
            "method": method,
            "weights": sum(prod(self.source.entries[f"{name}.weight"].shape) for name in names),
            "tokens": tokens,
            "threads": self.threads,
            **measured,
        }


def convert(job: Job, recipe: str) -> dict[str, Any]:
    """Convert the model with one of our recipes; return its row.

    Raises:
        RunError: the conversion failed.
    """
    options: list[str | Path] = ["--recipe", recipe, "--device", "cpu"]
    tokens = 0
    if recipe != "data-free":
        samples, length = job.calibration.num_samples, job.calibration.max_seq_length
        tokens = samples * length
        options += ["--calibration", Path(job.calibration.source).resolve()]
        options += ["--num-calibration-samples", str(samples), "--max-seq-length", str(length)]
    if recipe == "best":
        options += ["--tune-epochs", "1", "--distill-epochs", "1"]
    result, out = job.folder / f"{recipe}.json", job.folder / recipe
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.conversion.speed_convert"]
    command += [result, job.source.folder.resolve(), out, *options]
    measured = run(command, result, job.threads, ROOT)
    return job.row(recipe, tokens, measured)


def quantize_with_peer(job: Job, method: str, python: Path) -> dict[str, Any]:
    """Quantize the model with another library; return its row, with the library's `versions`.

    Raises:
        RunError: it failed.
    """
    ids = job.folder / "ids.safetensors"
    if not ids.exists():
        samples, _ = calibration_samples(job.calibration, job.source.folder, seed=0)
        save_file({"ids": samples}, ids)
    group_size = find_group_size(job.source)
    result = job.folder / f"{method}.json"
    command = peer_command(python, method, job.source.folder, ids, result, (BITS, group_size, job.threads))
    measured = run(command, result, job.threads, job.folder)
    tokens = job.calibration.num_samples * job.calibration.max_seq_length
    return job.row(method, tokens, {"bits": BITS, "group_size": group_size, **measured})


def find_group_size(source: Source) -> int:
    """Return the largest usual group size that divides the input widths of all linears, multiples of 32."""
    widths = {source.entries[f"{name}.weight"].shape[1] for name in source.linears_of_layer(0)}
    return next(size for size in GROUP_SIZES if not any(width % size for width in widths))


def measure(job: Job, methods: Sequence[str], pythons: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Run all methods on one model; yield their rows, and `model`, `method` and `error` of a library that failed."""
    for method in methods:
        if method in RECIPES:
            yield convert(job, method)
            continue
        try:
            yield quantize_with_peer(job, method, pythons[method])
        except RunError as error:
            yield {"model": job.name, "method": method, "error": str(error)}


def print_row(row: dict[str, Any]) -> None:
    """Print a row of `measure`."""
    title = f"{row['model']}, {row['method']}: "
    if "error" in row:
        print(title + row["error"], flush=True)
        return
    print(
        f"{title}{row['seconds']:.1f} s, {row['cpu_seconds']:.1f} CPU s, {row['peak_gb']:.2f} GB "
        f"({row['layers']} layers, {row['weights']:,} weights, {row['tokens']:,} tokens, {row['threads']} threads)"
    )
    for phase, part in row.get("phases", {}).items():
        print(f"    {phase:36} {part['seconds']:9.2f} s {part['cpu_seconds']:9.2f} CPU s")
    sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = (*REAL_MODELS, *RANDOM_MODELS)
    parser.add_argument("--models", help=f"{', '.join(models)}, or folders of models, joined by commas (all)")
    add_method_options(parser, (*RECIPES, *PEERS))
    parser.add_argument("--layers", type=int, help="first decoder layers of each model")
    parser.add_argument("--calibration", default=str(ROOT / "examples" / "text" / "calibration.txt"))
    parser.add_argument("--num-calibration-samples", type=int, default=64, help="calibration samples (64)")
    parser.add_argument(
        "--max-seq-length", type=int, default=512, help="tokens of a calibration sample (512)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads (all cores)")
    parser.add_argument("--quick", action="store_true", help="two layers and little text, in five minutes")
    parser.add_argument("--work", type=Path, help="folder for the models (a temporary one)")
    parser.add_argument("--out", type=Path, help="JSON file for the result, written after each conversion")
    arguments = parser.parse_args()
    if arguments.quick:
        models, arguments.layers = QUICK_MODELS, QUICK_LAYERS
        arguments.num_calibration_samples, arguments.max_seq_length = QUICK_SAMPLES, QUICK_LENGTH
    arguments.models = arguments.models.split(",") if arguments.models else models
    choose_methods(parser, arguments, RECIPES, PEERS)
    return arguments


def main() -> None:
    """Measure every model with every method."""
    arguments = parse_arguments()
    calibration = Calibration(
        arguments.calibration, arguments.num_calibration_samples, arguments.max_seq_length
    )
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            model = make_model(name, arguments.layers, Path(work) / "model")
            folder = Path(work) / "out"
            folder.mkdir()
            job = Job(Path(name).name, open_source(str(model)), calibration, arguments.threads, folder)
            for row in measure(job, arguments.methods, arguments.pythons):
                print_row(row)
                (failures if "error" in row else rows).append(row)
                if arguments.out:
                    text = {"source": Path(arguments.calibration).name, "samples": calibration.num_samples}
                    facts = {"calibration": {**text, "length": calibration.max_seq_length}}
                    write_result(arguments.out, rows, **facts, unavailable=failures)


if __name__ == "__main__":
    main()

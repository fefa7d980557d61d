"""Compare calibration on text that the model writes itself with calibration on real text.

    python -m benchmarks.quality.calibration_text --model smollm2-135m --bits 2.2 --calibration self FILE --text FILE \\
        --out benchmarks/results/calibration_text.json

The model is converted by recipe `fast` once for each calibration text, with the same number of samples. The losses
d = ln(perplexity / perplexity of the original model) are measured on real text, and on text that the model has written
with another seed, which is closer to what an assistant's user sees.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import bwla_converter.cli  # noqa: F401 - says how OpenMP waits, before torch is imported
import torch
from bwla_converter import BWLAError, Options, convert
from bwla_converter.calibration.self_text import Writing, write_calibration
from bwla_converter.calibration.text import written_samples
from bwla_converter.options import SELF, Calibration
from bwla_converter.source.model import open_source
from torch import Tensor

from benchmarks.common.record import command_line, write_result
from benchmarks.common.texts import EXAMPLES, add_text_options, evaluation_windows, model_folder
from benchmarks.quality.frontier import measure_perplexity

EXAMPLE = EXAMPLES.parent / "model"

EVALUATION_SEED = 1000
"""Seed of the self-written text on which the loss is measured."""


def self_windows(model: Path, window: int, count: int, memory: float) -> Tensor:
    """Return token ids [count, window] that the model writes, with a seed that no conversion uses."""
    calibration = Calibration(SELF, count, window)
    source = open_source(str(model))
    writing = Writing(source.folder, calibration, EVALUATION_SEED, torch.device("cpu"), memory)
    file = write_calibration(source, writing, lambda *_: None)
    return written_samples(Calibration(SELF, count, window, file))[:count]


def measure(
    model: Path, calibration: Calibration, arguments: argparse.Namespace, windows: dict[str, Tensor]
) -> dict[str, Any]:
    """Convert the model with one calibration text; return the perplexities on each evaluation text."""
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        summary = convert(
            Options(
                str(model),
                Path(folder) / "out",
                recipe="fast",
                target_bits=arguments.bits,
                seed=arguments.seed,
                calibration=calibration,
                device="cpu",
                threads=arguments.threads,
                report=False,
                text_samples=0,
            )
        )
        ppl = {name: measure_perplexity(Path(summary.out), part) for name, part in windows.items()}
    return {"bits": round(summary.bits_per_weight, 4), "seconds": summary.seconds, "ppl": ppl}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_text_options(parser, samples=32, length=1024)
    add = parser.add_argument
    add("--bits", type=float, default=2.2, help="bits per weight (2.2)")
    add("--seed", type=int, default=0, help="seed of the conversions (0)")
    texts = [SELF, str(EXAMPLES / "calibration.txt")]
    add("--calibration", nargs="+", default=texts, help="calibration texts, one conversion for each")
    add("--out", type=Path, help="JSON file for the rows; rows of other models are kept")
    return parser.parse_args()


def main() -> int:
    """Measure and print both calibration texts, and write the rows; return the exit status."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    samples, length = arguments.num_calibration_samples, arguments.max_seq_length
    try:
        model = model_folder(arguments.model)
        windows = {
            "real text": evaluation_windows(model, arguments),
            "self-written text": self_windows(model, arguments.window, arguments.limit, math.inf),
        }
        original = {name: measure_perplexity(model, part) for name, part in windows.items()}
        rows: list[dict[str, Any]] = []
        for source in arguments.calibration:
            row = measure(model, Calibration(source, samples, length), arguments, windows)
            d = {name: math.log(row["ppl"][name] / original[name]) for name in windows}
            text = SELF if source == SELF else Path(source).name
            rows.append(
                {
                    "model": "example" if model.resolve() == EXAMPLE else Path(arguments.model).name,
                    "target_bits": arguments.bits,
                    "seed": arguments.seed,
                    "calibration": text,
                    "samples": samples,
                    "length": length,
                    **row,
                    "ppl_original": original,
                    "d": d,
                    "evaluation": {"source": arguments.text.name, "window": arguments.window},
                    "command": command_line(),
                }
            )
            losses = ", ".join(f"d {value:.4f} on {name}" for name, value in d.items())
            print(f"{arguments.model}, calibrated on {text}: {losses}", flush=True)
    except BWLAError as error:
        print(f"calibration_text: {error}", file=sys.stderr)
        return 2
    if arguments.out is not None:
        write_result(arguments.out, [*kept_rows(arguments.out, rows), *rows])
    return 0


def kept_rows(out: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a result file that `rows` do not replace."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["target_bits"], row["seed"], row["calibration"]

    earlier = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    replaced = {key(row) for row in rows}
    return [row for row in earlier if key(row) not in replaced]


if __name__ == "__main__":
    sys.exit(main())

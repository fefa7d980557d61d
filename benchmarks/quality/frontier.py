"""Measure what quantization loses at a given size: our recipes at numbers of bits per weight, beside other libraries.

    python -m benchmarks.quality.frontier --methods fast --bits 2.2 --text FILE --out benchmarks/results/frontier.json
    python -m benchmarks.quality.frontier --methods hqq --peer-bits 2,3,4 --peer-python hqq=PEERS/hqq/bin/python \\
        --text FILE --out benchmarks/results/frontier.json

d = ln(perplexity / perplexity of the original model), measured as `bwla-eval` does on the first windows of a text that
no method was calibrated on. All methods get the same calibration samples. Bits per weight count everything that is
stored for a quantized weight: for the other libraries the code, and the group's scale and zero point. These compute
with 16-bit activations, and each needs the Python of an environment in which it is installed, see
docs/benchmarks/quality.md.

--out is written after each method. A row that it contains already is replaced if it is measured again, and kept if not,
so that the methods can be measured one at a time. A method that fails is listed under `unavailable`.
"""

import argparse
import gc
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import bwla_converter.cli  # noqa: F401 - says how OpenMP waits, before torch is imported
import torch
from bwla_converter import BWLAError, Options, convert
from bwla_converter.calibration.text import calibration_samples
from bwla_converter.evaluation.perplexity import perplexity
from bwla_converter.options import Calibration, RecipeName
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common.processes import RunError, add_method_options, choose_methods, peer_command, run
from benchmarks.common.record import command_line, write_result
from benchmarks.common.texts import EXAMPLES, add_text_options, evaluation_windows, model_folder
from benchmarks.conversion.peers import PEERS

RECIPES = ("data-free", "paper", "fast", "best")
WITHOUT_TEXT = ("data-free",)
FRONTIER_PEERS = tuple(name for name, peer in PEERS.items() if peer.dequantizes)
PEER_ABITS = 16
KEY = ("model", "method", "target_bits", "code_bits", "group_size", "abits", "seed")
"""The entries of a row that say what was measured."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What all methods share.

    Attributes:
        name: name of the model in the rows.
        model: its folder.
        calibration: the calibration text.
        windows: token ids [W, T] of the text that the perplexity is measured on.
        ppl_original: the original model's perplexity.
        threads: threads that a method may use.
        epochs: recipe `best`: epochs of tuning and of distillation; None for the recipe's default.
        folder: an empty folder for the conversions' files.
    """

    name: str
    model: Path
    calibration: Calibration
    windows: Tensor
    ppl_original: float
    threads: int
    epochs: tuple[int | None, int | None]
    folder: Path

    def row(self, variant: Row, ppl: float, **measured: Any) -> Row:
        """Return a complete row.

        Args:
            variant: what was measured, the entries of `KEY` but for the model.
            ppl: perplexity of the quantized model.
            measured: bits, seconds and what else is known.
        """
        losses = {"ppl": ppl, "ppl_original": self.ppl_original, "d": math.log(ppl / self.ppl_original)}
        return {"model": self.name, **variant, **losses, **measured, "command": command_line()}


def measure_perplexity(folder: Path, windows: Tensor) -> float:
    """Return the perplexity of a model or BWLA checkpoint, loaded as `bwla-eval` loads it."""
    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers

    return perplexity(AutoModelForCausalLM.from_pretrained(folder).eval(), windows)


def convert_with(job: Job, recipe: str, target_bits: float | None, abits: int, seed: int) -> Row:
    """Convert the model with one of our recipes and evaluate it; return the row.

    Args:
        job: what all methods share.
        recipe: an element of `RECIPES`.
        target_bits: bits per weight that the planes are chosen for; None for what the recipe does without a target.
        abits: bits of the activations.
        seed: seed of the conversion.

    Raises:
        BWLAError: the recipe cannot be used with these options.
    """
    tune_epochs, distill_epochs = job.epochs if recipe == "best" else (None, None)
    summary = convert(
        Options(
            model=str(job.model),
            out=job.folder / recipe,
            recipe=cast(RecipeName, recipe),
            target_bits=target_bits,
            bits=abits,
            seed=seed,
            overwrite=True,
            calibration=None if recipe in WITHOUT_TEXT else job.calibration,
            tune_epochs=tune_epochs,
            distill_epochs=distill_epochs,
            device="cpu",
            threads=job.threads,
            report=False,
            text_samples=0,
        )
    )
    variant = {"method": recipe, "target_bits": target_bits, "abits": abits, "seed": seed}
    ppl = measure_perplexity(Path(summary.out), job.windows)
    gc.collect()
    return job.row(
        variant,
        ppl,
        bits=round(summary.bits_per_weight, 4),
        predicted=summary.predicted_loss,
        seconds=summary.seconds,
    )


def quantize_with_peer(job: Job, variant: Row, python: Path) -> Row:
    """Quantize and evaluate the model with another library; return the row, with the library's `versions`.

    Args:
        job: what all methods share.
        variant: the row's method, code_bits, group_size, abits and seed.
        python: the Python of the library's environment.

    Raises:
        RunError: it failed.
    """
    method, bits, group_size, seed = (variant[key] for key in ("method", "code_bits", "group_size", "seed"))
    ids, _ = calibration_samples(job.calibration, job.model, seed)
    samples, result = job.folder / "samples.safetensors", job.folder / "peer.json"
    save_file({"ids": ids, "windows": job.windows.contiguous()}, samples)
    result.unlink(missing_ok=True)
    command = peer_command(python, method, job.model, samples, result, (bits, group_size, job.threads))
    measured = run(command, result, job.threads, job.folder)
    return job.row(
        variant,
        measured["ppl"],
        bits=round(PEERS[method].bits_per_weight(bits, group_size), 4),
        seconds=measured["seconds"],
        versions=measured["versions"],
    )


def measure(job: Job, arguments: argparse.Namespace) -> Iterator[Row]:
    """Run every method that the command line names; yield their rows, and `KEY` and `error` of each that failed."""
    for method in arguments.methods:
        for variant in variants_of(method, arguments):
            try:
                if method in RECIPES:
                    abits, seed = variant["abits"], variant["seed"]
                    yield convert_with(job, method, variant["target_bits"], abits, seed)
                else:
                    yield quantize_with_peer(job, variant, arguments.pythons[method])
            except (RunError, BWLAError) as error:
                yield {"model": job.name, **variant, "error": str(error), "command": command_line()}


def variants_of(method: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield what the command line asks for of a method: the entries of `KEY` but for the model."""
    for seed in arguments.seeds:
        if method in RECIPES:
            for target in arguments.bits:
                for abits in arguments.abits:
                    yield {"method": method, "target_bits": target, "abits": abits, "seed": seed}
            continue
        for group_size in arguments.group_sizes:
            for bits in arguments.peer_bits:
                sizes = {"code_bits": bits, "group_size": group_size}
                yield {"method": method, **sizes, "abits": PEER_ABITS, "seed": seed}


def key_of(row: Row) -> tuple[Any, ...]:
    """Return what a row measures; equal keys replace each other."""
    return tuple(row.get(key) for key in KEY)


def merge(rows: Sequence[Row], row: Row) -> list[Row]:
    """Return the rows with one more, which replaces the row with the same key in its place."""
    replaced = {key_of(old): old for old in rows}
    replaced[key_of(row)] = row
    return list(replaced.values())


def read_earlier(out: Path | None, settings: dict[str, Any]) -> tuple[list[Row], list[Row]]:
    """Return the rows and the failures that earlier runs have written to a result file.

    Raises:
        BWLAError: they were measured with other settings.
    """
    if out is None or not out.exists():
        return [], []
    result = json.loads(out.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if result.get(name) != value:
            raise BWLAError(
                f"--out {out}: expected rows with the {name} {value}, found {result.get(name)}: give the same "
                "options, or choose another file"
            )
    return result["rows"], result["unavailable"]


def record(out: Path, settings: dict[str, Any], row: Row) -> None:
    """Add a row of `measure` to a result file, which is read again, as another process may have added rows meanwhile.

    Raises:
        BWLAError: the file's rows were measured with other settings.
    """
    rows, failures = read_earlier(out, settings)
    if "error" in row:
        failures = merge(failures, row)
    else:
        rows = merge(rows, row)
        failures = [failure for failure in failures if key_of(failure) != key_of(row)]
    write_result(out, rows, **settings, unavailable=failures)


def parse_bits(text: str) -> float | None:
    """Parse an element of --bits."""
    return None if text == "auto" else float(text)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_text_options(parser, samples=64, length=512)
    add = parser.add_argument
    add_method_options(parser, (*RECIPES, *FRONTIER_PEERS))
    add("--bits", default="1.16,2.2,3.2", help="our bits per weight; auto: the recipe's own (1.16,2.2,3.2)")
    add("--abits", default="6", help="our activation bits (6)")
    add("--seeds", default="0", help="seeds, joined by commas (0)")
    add("--tune-epochs", type=int, help="recipe best (its default)")
    add("--distill-epochs", type=int, help="recipe best (its default)")
    add("--peer-bits", default="2,3,4", help="bits of the other libraries' codes (2,3,4)")
    add("--group-sizes", default="64", help="group sizes of the other libraries (64)")
    add("--calibration", default=str(EXAMPLES / "calibration.txt"), help="calibration text")
    add("--out", type=Path, help="JSON file for the rows, written after each method")
    arguments = parser.parse_args(words)
    choose_methods(parser, arguments, RECIPES, FRONTIER_PEERS)
    try:
        arguments.bits = [parse_bits(text) for text in arguments.bits.split(",")]
        for name in ("abits", "seeds", "peer_bits", "group_sizes"):
            setattr(arguments, name, [int(text) for text in getattr(arguments, name).split(",")])
    except ValueError as error:
        parser.error(f"expected numbers, joined by commas, found {error}")
    return arguments


def print_row(row: Row) -> None:
    """Print a row of `measure`."""
    what = ", ".join(f"{key} {row[key]}" for key in KEY[2:] if row.get(key) is not None)
    title = f"{row['model']}, {row['method']}, {what}: "
    if "error" in row:
        print(title + row["error"], flush=True)
        return
    predicted = "" if row.get("predicted") is None else f" (predicted {row['predicted']:.4f})"
    found = f"{row['bits']:.3f} bits, perplexity {row['ppl']:.2f}, d {row['d']:.4f}{predicted}"
    print(f"{title}{found}, {row['seconds']:.0f} s", flush=True)


def main() -> int:
    """Measure, and merge the rows into the result; return the exit status."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    samples, length = arguments.num_calibration_samples, arguments.max_seq_length
    model = model_folder(arguments.model)
    try:
        windows = evaluation_windows(model, arguments)
        settings: dict[str, Any] = {
            "calibration": {
                "source": Path(arguments.calibration).name,
                "samples": samples,
                "length": length,
            },
            "evaluation": {
                "source": arguments.text.name,
                "window": arguments.window,
                "windows": len(windows),
            },
        }
        read_earlier(arguments.out, settings)
    except BWLAError as error:
        print(f"frontier: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        job = Job(
            Path(arguments.model).name,
            model,
            Calibration(arguments.calibration, samples, length),
            windows,
            measure_perplexity(model, windows),
            arguments.threads,
            (arguments.tune_epochs, arguments.distill_epochs),
            Path(folder),
        )
        for row in measure(job, arguments):
            print_row(row)
            if arguments.out is not None:
                record(arguments.out, settings, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())

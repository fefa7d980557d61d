"""Convert a model, serve it with vLLM beside the original, ask both the same question, and measure both.

`make demo` runs this in the project's environment. The exit status is 1 if a step fails. Options that are not listed
here go to bwla-convert, in place of the sizes that the demo shows otherwise.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bwla_converter.calibration.text import load_tokenizer, tokenize
from bwla_converter.calibration.text_files import read_text
from bwla_converter.common.bars import no_bars
from bwla_converter.evaluation.perplexity import perplexity, windows_of
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common.record import ROOT, write_result
from benchmarks.common.server import HEALTH_SECONDS, Server
from scripts.demo.client import Client
from scripts.demo.models import KNOWN, PRETRAINED, Conversion, DemoError, DemoModel, choose
from scripts.demo.prepare import Serving, prepared

HELD_OUT = ROOT / "examples" / "text" / "heldout.txt"
WINDOW = 512
RESULT = "demo.json"
"""Name of the file in the output folder with what was measured."""


@dataclass(frozen=True)
class Subject:
    """A model that is served and asked.

    Attributes:
        title: what it is called in the output.
        folder: the original, or a checkpoint.
        bits: bits per quantized weight, everything counted; 16 for the original.
        answers: whether its answer has to be right.
        perplexity: on the held-out text, if it is known already.
    """

    title: str
    folder: Path
    bits: float
    answers: bool = True
    perplexity: float | None = None


@dataclass(frozen=True)
class Found:
    """What was measured of a served model.

    Attributes:
        title: what it is.
        bits: as in `Subject`.
        size: bytes of the weights' files.
        perplexity: on the held-out text.
        speed: decoded tokens per second at batch 1.
        answer: its answer to the prompt.
    """

    title: str
    bits: float
    size: int
    perplexity: float
    speed: float
    answer: str


def say(step: str) -> None:
    """Print the heading of a step."""
    print(f"\n== {step}", flush=True)


def perplexity_of(original: Path, windows: Tensor) -> float:
    """Return the original's perplexity on windows of token ids [W, T], computed by transformers in float32.

    Without instructions for bfloat16, a processor would take minutes for it in vLLM.
    """
    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    return perplexity(model.eval(), windows)


def converted(conversion: Conversion, out: Path) -> Subject:
    """Return what a conversion has written into the folder `out`."""
    folder = out / conversion.folder
    report = json.loads((folder / "bwla_report.json").read_text())
    return Subject(conversion.title, folder, report["bits_per_weight"], conversion.answers)


def try_out(model: DemoModel, subject: Subject, server: Server, windows: Tensor) -> Found:
    """Ask a served model, and measure it.

    Args:
        model: what is asked.
        subject: what is served.
        server: serves it.
        windows: token ids [W, T] of the held-out text.
    """
    print(f"\n{subject.title}: {model.prompt}", end=" " if model.chat else "", flush=True)
    client = Client(server, model.chat)
    answer = client.answer(model.prompt)
    speed = max(client.tokens_per_second(model.prompt) for _ in range(2))
    known = subject.perplexity
    measured = client.perplexity(windows) if known is None else known
    print(f"{speed:.1f} tokens/s, perplexity {measured:.2f}", flush=True)
    size = sum(file.stat().st_size for file in subject.folder.glob("*.safetensors"))
    return Found(subject.title, subject.bits, size, measured, speed, answer)


def check_answer(model: DemoModel, found: Found) -> None:
    """Raise DemoError if an answer lacks the expected word."""
    if model.expected is not None and model.expected not in found.answer:
        raise DemoError(
            f"{found.title}: expected {model.expected} in the answer to {model.prompt!r}, found {found.answer!r}"
        )


def run(model: DemoModel, out: Path, text: Path, limit: int, serving: Serving) -> list[Found]:
    """Convert, serve and measure; return what was found of the original and of each conversion.

    Args:
        model: the model.
        out: folder for the checkpoints and the logs.
        text: held-out text.
        limit: number of windows of the text.
        serving: how the models are served.
    """
    folder = model.folder()
    ids = tokenize(load_tokenizer(folder), [read_text(text, "--text")], folder, "--text")
    windows = windows_of(ids, WINDOW)[:limit]
    say("convert, and serve what is converted beside the original in bfloat16")
    started = time.monotonic()
    with prepared(model, out, serving) as waiting:
        original = Subject("original", folder, 16.0, perplexity=perplexity_of(folder, windows))
        servers = waiting()
        print(f"ready after {time.monotonic() - started:.0f} s")
        subjects = [original, *(converted(conversion, out) for conversion in model.conversions)]
        found = [try_out(model, *each, windows) for each in zip(subjects, servers, strict=True)]
    for subject, of_subject in zip(subjects, found, strict=True):
        if subject.answers:
            check_answer(model, of_subject)
    return found


def print_table(found: list[Found]) -> None:
    """Print what was measured, a row for each model."""
    table = Table()
    for column in ("", "bits per weight", "weights on disk", "perplexity", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for row in found:
        table.add_row(
            row.title, f"{row.bits:.3f}", decimal(row.size), f"{row.perplexity:.2f}", f"{row.speed:.1f}"
        )
    Console().print(table)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=PRETRAINED, help=f"{', '.join(KNOWN)}, a folder or a GGUF file ({PRETRAINED})")
    add("--out", type=Path, default=ROOT / ".demo", help="folder for the checkpoints (.demo)")
    add("--text", type=Path, default=HELD_OUT, help="held-out text for the perplexity")
    add("--windows", type=int, default=8, help=f"number of windows of {WINDOW} tokens to evaluate (8)")
    add("--compiled", action="store_true", help="serve with torch.compile (slower to start)")
    add("--start-seconds", type=float, default=HEALTH_SECONDS, help="seconds that a server may take to start")
    arguments, options = parser.parse_known_args()
    started = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        model = choose(arguments.model, tuple(options))
        print(f"model: {model.title}")
        serving = Serving(arguments.compiled, arguments.start_seconds, out)
        found = run(model, out, arguments.text, arguments.windows, serving)
    except Exception as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        return 1
    say("result")
    print_table(found)
    seconds = round(time.monotonic() - started)
    rows = [asdict(row) for row in found]
    write_result(out / RESULT, rows, prompt=model.prompt, model=model.title, seconds=seconds)
    original, best = found[:2]
    print(
        f"demo: ok - perplexity {original.perplexity:.2f} -> {best.perplexity:.2f}, "
        f"{best.bits:.3f} bits per weight, {seconds} seconds"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

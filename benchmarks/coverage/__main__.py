"""Convert and serve a tiny random model of every architecture, and compare it with vLLM on the dequantized weights.

    python -m benchmarks.coverage --out benchmarks/results/coverage.json
    python -m benchmarks.coverage --cases llama,qwen3_moe --recipes paper,fast
    python -m benchmarks.coverage --recipes fast --lm-head-bits 3

A case is built, converted with each recipe with 16-bit activations, head and embedding, dequantized, and served by vLLM
in all these forms: the converted model must give the tokens and the log probabilities of its dequantized weights. It is
also converted with the default options, with 6-bit activations, and served. Every case runs in processes of its own, so
that one which crashes or takes too long is one row.

--out is written after each case. A row that it contains already is replaced if the case runs again, and kept if not.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.record import commit, write_result
from benchmarks.coverage.cases import CASES
from benchmarks.coverage.rows import Row, make_row, merge, summary_of
from benchmarks.coverage.steps import EXACT_BITS, steps_of
from benchmarks.coverage.worker import LOG, Workers

RECIPES = ("data-free", "paper", "fast", "best")
STEP_SECONDS = 240


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; exit if it is wrong."""
    parser = argparse.ArgumentParser(prog="coverage", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--cases", default=",".join(CASES), help="names of cases, joined by commas (all)")
    add("--recipes", default="paper,fast", help=f"{', '.join(RECIPES)}, joined by commas (paper,fast)")
    add("--lm-head-bits", type=int, default=EXACT_BITS, help="2 to 4: with the head in binary planes (16)")
    add("--seconds", type=float, default=STEP_SECONDS, help=f"time limit of a step ({STEP_SECONDS})")
    add("--work", type=Path, help="folder for the models and logs, which stay there (a temporary one)")
    add("--missing", action="store_true", help="leave out the cases that --out has a row of")
    add("--out", type=Path, help="result file for the rows, written after each case")
    arguments = parser.parse_args(words)
    for name, known in (("cases", CASES), ("recipes", RECIPES)):
        found = getattr(arguments, name).split(",")
        setattr(arguments, name, found)
        if unknown := [word for word in found if word not in known]:
            parser.error(f"--{name}: expected some of {', '.join(known)}, found {', '.join(unknown)}")
    if arguments.missing and arguments.out is None:
        parser.error("--missing: expected --out, the file that may have rows, found none")
    return arguments


def read_rows(out: Path | None) -> list[Row]:
    """Return the rows that earlier runs have written to a result file."""
    if out is None or not out.exists():
        return []
    rows: list[Row] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return rows


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Run the cases of the command line, and record their rows."""
    workers = Workers(folder / "cache")
    recorded = {row["case"] for row in read_rows(arguments.out)} if arguments.missing else set()
    for name in arguments.cases:
        if name in recorded:
            continue
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        steps = steps_of(arguments.recipes, CASES[name].dtype, arguments.lm_head_bits)
        answers = workers.run(steps, name, place, arguments.seconds)
        row = make_row(CASES[name], arguments.recipes, answers, place)
        print(summary_of(row, arguments.recipes), flush=True)
        if arguments.out is not None:
            write_result(arguments.out, merge(read_rows(arguments.out), {**row, "commit": commit()}))


def main() -> int:
    """Run the command line; return the exit status."""
    arguments = parse_arguments()
    if arguments.work is not None:
        print(f"logs: {arguments.work / '*' / LOG}")
        run(arguments, arguments.work.absolute())
        return 0
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        run(arguments, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())

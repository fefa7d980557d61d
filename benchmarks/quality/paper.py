"""Reproduce one row of the paper's table 1: convert, evaluate, and print our figures beside the paper's.

    python -m benchmarks.quality.paper qwen3-8b-a6                       # recipe paper
    python -m benchmarks.quality.paper qwen3-8b-a6 --recipe best --calibration c4
    python -m benchmarks.quality.paper qwen3-8b-a6 --model ./Qwen3-8B    # a local folder

Rows and settings are in paper.yaml. Calibration on WikiText-2 flatters the perplexity on WikiText-2: publish results of
both calibration texts.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.common.record import ROOT, write_result

TABLE = ROOT / "benchmarks/quality/paper.yaml"
CONVERT = "from bwla_converter.cli.convert import main; main()"
EVALUATE = "from bwla_converter.cli.evaluate import main; main()"
SETTINGS = (
    "model",
    "recipe",
    "calibration",
    "num_calibration_samples",
    "max_seq_length",
    "text",
    "window",
    "tasks",
)
"""Settings of a row that the command line can replace."""


def read_row(name: str) -> dict[str, Any]:
    """Return the settings of a row of paper.yaml, with the defaults filled in.

    Raises:
        ValueError: there is no such row.
    """
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    if name not in table["rows"]:
        raise ValueError(f"ROW: expected one of {', '.join(table['rows'])}, found {name!r}")
    return {**table["defaults"], **table["rows"][name]}


def commands(row: dict[str, Any], out: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """Return the commands that convert and evaluate a row; their results go to the folder `out`."""
    bwla, figures = str(out / "model"), str(out / "figures.json")
    python = [sys.executable, "-c"]
    convert = [
        *python,
        CONVERT,
        row["model"],
        bwla,
        "--recipe",
        row["recipe"],
        "--abits",
        str(row["abits"]),
        "--resume",
    ]
    if row["recipe"] != "data-free":
        convert += [
            "--calibration",
            row["calibration"],
            "--num-calibration-samples",
            str(row["num_calibration_samples"]),
        ]
        convert += ["--max-seq-length", str(row["max_seq_length"])]
    evaluate = [*python, EVALUATE, row["model"], bwla, "--text", row.get("text", "wikitext2")]
    evaluate += ["--window", str(row["window"]), "--out", figures]
    if row["tasks"]:
        evaluate += ["--tasks", row["tasks"]]
    if limit is not None:
        evaluate += ["--limit", str(limit)]
    return convert, evaluate


def show(name: str, row: Mapping[str, Any], results: Mapping[str, Mapping[str, float]]) -> None:
    """Print our figures beside those of the paper."""
    sides = ("original", "bwla")
    table = Table("figure", "original", "ours", "paper", title=f"{name}, recipe {row['recipe']}")
    figures = [f"{results['perplexity'][side]:.2f}" for side in sides]
    table.add_row("perplexity", *figures, str(row["paper_ppl"]))
    scores = [figures for key, figures in results.items() if key.endswith(" acc")]
    if scores:
        means = [100 * sum(score[side] for score in scores) / len(scores) for side in sides]
        table.add_row("mean accuracy", *(f"{mean:.2f}" for mean in means), str(row["paper_tasks"]))
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("row", metavar="ROW", help="a row of paper.yaml")
    settings = parser.add_argument_group("settings that replace those of the row").add_argument
    settings("--model", help="folder or Hub id")
    settings("--recipe", help="recipe")
    settings("--calibration", help="calibration text")
    settings("--num-calibration-samples", type=int, help="calibration samples")
    settings("--max-seq-length", type=int, help="tokens of a calibration sample")
    settings("--text", help="evaluation text (wikitext2)")
    settings("--window", type=int, help="tokens of an evaluation window")
    settings("--tasks", help="zero-shot tasks; '' for none")
    add("--limit", type=int, help="largest number of evaluation windows and examples, for a trial")
    add("--work", type=Path, default=ROOT / ".paper", help="folder of the converted models (.paper)")
    add("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> int:
    """Convert and evaluate one row; return the exit status."""
    arguments = parse_arguments()
    given = {key: value for key, value in vars(arguments).items() if key in SETTINGS and value is not None}
    try:
        row = read_row(arguments.row) | given
    except ValueError as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    folder = arguments.work / f"{arguments.row}-{row['recipe']}"
    folder.mkdir(parents=True, exist_ok=True)
    convert, evaluate = commands(row, folder, arguments.limit)
    if not (folder / "model").exists():
        subprocess.run(convert, check=True)
    subprocess.run(evaluate, check=True)
    results = json.loads((folder / "figures.json").read_text(encoding="utf-8"))["results"]
    show(arguments.row, row, results)
    if arguments.out is not None:
        write_result(arguments.out, [{"row": arguments.row, **row, "results": results}])
    return 0


if __name__ == "__main__":
    sys.exit(main())

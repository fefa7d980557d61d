"""One row of the paper's table with our code: convert, evaluate, set beside what the paper reports.

    python -m benchmarks.quality.paper qwen3-8b-a6                       recipe paper, as published
    python -m benchmarks.quality.paper qwen3-8b-a6 --recipe best --calibration c4
    python -m benchmarks.quality.paper qwen3-8b-a6 --model ./Qwen3-8B    weights that are at hand already

Rows and settings are in paper.yaml. Calibrating on WikiText-2 flatters WikiText-2: run both and publish both.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.common.record import ROOT, write_result

TABLE = ROOT / "benchmarks/quality/paper.yaml"
CONVERT = "from bwla_converter.cli.convert import main; main()"
EVALUATE = "from bwla_converter.cli.evaluate import main; main()"


def read_row(name: str) -> dict[str, Any]:
    """The settings of a row, defaults filled in.

    Raises:
        typer.BadParameter: there is no such row.
    """
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    if name not in table["rows"]:
        raise typer.BadParameter(
            f"{name!r} is no row; there are {', '.join(table['rows'])}", param_hint="ROW"
        )
    return {**table["defaults"], **table["rows"][name]}


def commands(row: dict[str, Any], out: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """How to convert and how to evaluate a row; results go to `out`."""
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
    if row["recipe"] != "paper":
        convert += ["--calibration", row["calibration"], "--num-calibration-samples", str(row["samples"])]
        convert += ["--max-seq-length", str(row["length"])]
    evaluate = [*python, EVALUATE, row["model"], bwla, "--text", row.get("text", "wikitext2")]
    evaluate += ["--window", str(row["window"]), "--out", figures]
    if row["tasks"]:
        evaluate += ["--tasks", row["tasks"]]
    if limit is not None:
        evaluate += ["--limit", str(limit)]
    return convert, evaluate


def main(
    name: Annotated[str, typer.Argument(metavar="ROW", help="A row of paper.yaml.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id in the place of the row's.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe in the place of the row's.")] = None,
    calibration: Annotated[str | None, typer.Option(help="Text in the place of the row's.")] = None,
    samples: Annotated[int | None, typer.Option(help="Windows in the place of the row's.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a window in the place of the row's.")] = None,
    text: Annotated[str | None, typer.Option(help="File to evaluate on in the place of WikiText-2.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window of the evaluation.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks in the place of the row's; '' for none.")] = None,
    limit: Annotated[int | None, typer.Option(help="Windows and examples at most, for a trial.")] = None,
    work: Annotated[Path, typer.Option(help="Where the converted model goes.")] = ROOT / ".paper",
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Convert and evaluate one row."""
    given = {
        "model": model,
        "recipe": recipe,
        "calibration": calibration,
        "samples": samples,
        "length": length,
    }
    given |= {"text": text, "window": window, "tasks": tasks}
    row = read_row(name) | {key: value for key, value in given.items() if value is not None}
    folder = work / f"{name}-{row['recipe']}"
    folder.mkdir(parents=True, exist_ok=True)
    convert, evaluate = commands(row, folder, limit)
    if not (folder / "model").exists():
        subprocess.run(convert, check=True)
    subprocess.run(evaluate, check=True)
    results = json.loads((folder / "figures.json").read_text(encoding="utf-8"))["results"]
    table = Table("figure", "original", "ours", "paper", title=f"{name}, recipe {row['recipe']}")
    scores = {key: figures for key, figures in results.items() if key.endswith(" acc")}
    table.add_row(
        "perplexity",
        *(f"{results['perplexity'][side]:.2f}" for side in ("original", "bwla")),
        str(row["paper_ppl"]),
    )
    if scores:
        means = (
            100 * sum(each[side] for each in scores.values()) / len(scores) for side in ("original", "bwla")
        )
        table.add_row("mean accuracy", *(f"{mean:.2f}" for mean in means), str(row["paper_tasks"]))
    Console().print(table)
    if out is not None:
        write_result(out, [{"row": name, **row, "results": results}])


if __name__ == "__main__":
    typer.run(main)

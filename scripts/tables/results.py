"""Read result files, and format tables in Markdown."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
METHODS = {
    "rtn": "round to nearest, 1 bit",
    "gptq": "GPTQ, 1 bit",
    "gptq, equal bits": "GPTQ, equal bits",
    "hadamard+gptq": "Hadamard rotation + GPTQ",
    "billm": "BiLLM (our implementation)",
    "data-free": "`data-free`",
    "paper": "`paper`",
    "fast": "`fast`",
    "best": "`best`",
}
RENAMED = "2026-11-29T12:00:00+00:00"
"""Until then, results call the recipe `data-free` "paper"."""

Rows = list[dict[str, Any]]


def read_result(name: str) -> dict[str, Any]:
    """Read a result file by its name without `.json`. Recipes have their present names."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if isinstance(result["rows"], list) and result.get("date", RENAMED) < RENAMED:
        for row in result["rows"]:
            if "method" in row:
                row["method"] = re.sub("^paper", "data-free", row["method"])
    return result


def read_rows(names: str) -> Rows:
    """Read the rows of quality results, each with the number of calibration samples of its file."""
    return [
        {**row, "samples": result["samples"]}
        for result in map(read_result, names.split("+"))
        for row in result["rows"]
    ]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def mean_loss(rows: Rows, abits: int) -> str:
    """Format mean and standard deviation of d over the seeds, at `abits` activation bits."""
    losses = [row["d"] for row in rows if row["abits"] == abits]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{spread}"


def mean(rows: Rows, entry: str) -> float:
    """Return the mean of a number over rows."""
    return float(statistics.mean(row[entry] for row in rows))

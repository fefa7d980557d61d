"""Write README's tables that say what is known elsewhere: model families from the converter, quality from results.

python scripts/readme_tables.py            # write them
python scripts/readme_tables.py --check    # fail where README differs
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from bwla_converter.source.families import family_table

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN = "<!-- table: "
MARKED = re.compile(
    r"(<!-- table: (families|quality|ablations|amounts|gpu) ?(\S*); scripts/readme_tables.py -->\n)"
    r".*?(\n<!-- end of table -->)",
    re.S,
)
"""A table between its marks: which kind, and the names of the result files, if any, joined by +."""

ABITS = (16, 8, 6, 4)
METHODS = {
    "rtn": "round to nearest, 1 bit",
    "gptq": "GPTQ, 1 bit",
    "gptq, equal bits": "GPTQ, equal bits",
    "hadamard+gptq": "Hadamard rotation + GPTQ",
    "billm": "BiLLM (written from its paper)",
    "paper": "`paper`",
    "fast": "`fast`",
    "best": "`best`",
}
ABLATIONS = {
    "best, 8 distillation epochs": "`best` with `--distill-epochs 8`",
    "best": "`best`",
    "best, signs not distilled": "`best` with signs that stay in distillation",
    "best, no distillation": "`best` without distillation",
    "best, no tuning": "`best` without tuning of blocks",
    "fast": "`fast`",
    "fast, last norm as it was": "`fast` with the last norm as it was",
    "fast, no column scales": "`fast` without column scales",
    "fast, no PSP": "`fast` without the low-rank part",
    "fast, random rotation": "`fast` with a random rotation in place of OKT",
    "fast, no coordinate descent": "`fast` without coordinate descent",
    "fast, no error feedback": "`fast` without error feedback and coordinate descent",
    "fast, original target": "`fast` without making good what earlier blocks lost",
    "paper": "`paper`",
    "paper, rank 0": "`paper` without the low-rank part",
}

Rows = list[dict[str, Any]]


def rows_of(names: str) -> Rows:
    """The rows of some result files, each with the calibration windows of its file."""
    files = [RESULTS / f"{name}.json" for name in names.split("+")]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [{**row, "samples": result["samples"]} for result in results for row in result["rows"]]


def cell(rows: Rows, abits: int) -> str:
    """Mean and deviation of d over the seeds."""
    found = [row["d"] for row in rows if row["abits"] == abits]
    spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.3f}{spread}"


def quality_table(rows: Rows) -> str:
    """One line a method, one column an activation width."""
    lines = [
        "| method | all-in bits per weight | d, 16-bit activations | 8-bit | 6-bit | 4-bit | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, title in METHODS.items():
        mine = [row for row in rows if row["method"] == method]
        if mine:
            cells = " | ".join(cell(mine, abits) for abits in ABITS)
            seeds = len({row["seed"] for row in mine})
            lines.append(f"| {title} | {mine[0]['bits_per_weight']:.2f} | {cells} | {seeds} |")
    return "\n".join(lines)


def ablation_table(rows: Rows) -> str:
    """One line a recipe with a part left out or changed, at 6-bit activations."""
    lines = ["| | all-in bits per weight | d | seeds |", "|---|---|---|---|"]
    for method, title in ABLATIONS.items():
        mine = [row for row in rows if row["method"] == method]
        seeds = len({row["seed"] for row in mine})
        lines.append(f"| {title} | {mine[0]['bits_per_weight']:.2f} | {cell(mine, 6)} | {seeds} |")
    return "\n".join(lines)


def amounts_table(rows: Rows) -> str:
    """One line an amount of calibration text, at 6-bit activations: seed 0, which every amount was measured with."""
    found = {
        (row["samples"], row["method"]): row["d"] for row in rows if row["abits"] == 6 and row["seed"] == 0
    }
    methods = ("gptq", "gptq, equal bits", "fast", "best")
    lines = [
        "| calibration windows | " + " | ".join(METHODS[method] for method in methods) + " |",
        "|---|" + "---|" * len(methods),
    ]
    for samples in sorted({row["samples"] for row in rows}):
        values = (found.get((samples, method)) for method in methods)
        cells = " | ".join("" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"| {samples:,} | {cells} |")
    return "\n".join(lines)


GPU_LAYERS = (
    ("gate_up", 1),
    ("down", 1),
    ("qkv", 1),
    ("o", 1),
    ("gate_up", 8),
    ("gate_up", 4096),
    ("qkv", 4096),
)
"""Linears of Qwen3-32B and numbers of tokens that README shows: every linear at one token, then how it goes on."""


def gpu_table(names: str) -> str:
    """One line a linear or head of Qwen3-32B: microseconds of BWLA and of cuBLAS in bfloat16, and their ratio."""
    steps = json.loads((RESULTS / f"{names}.json").read_text(encoding="utf-8"))["rows"]
    layers = {(row["layer"], row["m"]): row for row in steps["layer"] if row.get("model") == "32b"}
    heads = {
        row["head"]: row
        for row in steps["chain"]
        if row.get("head") and row["model"] == "32b" and row["m"] == 1
    }
    lines = ["| Qwen3-32B on an H200, microseconds | BWLA | cuBLAS bf16 | ratio |", "|---|---|---|---|"]
    found = [
        (f"{name} ({row['n']} x {row['k']}), {m} token{'s' * (m > 1)}", row["fused_us"], row["bf16_us"])
        for name, m in GPU_LAYERS
        if (row := layers[name, m])["ok"]
    ]
    head = heads["triton"]
    found.append(
        (f"8-bit head ({head['v']} x {head['k']}), 1 token", head["head_us"], heads["bf16"]["head_us"])
    )
    return "\n".join(
        [
            *lines,
            *(f"| {what} | {ours:.1f} | {bf16:.1f} | {bf16 / ours:.1f}x |" for what, ours, bf16 in found),
        ]
    )


def with_tables(text: str) -> str:
    """README's text with every marked table made anew.

    Raises:
        ValueError: a mark is broken.
    """

    def table(found: re.Match[str]) -> str:
        if found[2] == "families":
            return found[1] + family_table() + found[4]
        if found[2] == "gpu":
            return found[1] + gpu_table(found[3]) + found[4]
        make = {"quality": quality_table, "ablations": ablation_table, "amounts": amounts_table}
        return found[1] + make[found[2]](rows_of(found[3])) + found[4]

    new, count = MARKED.subn(table, text)
    if count == 0 or count != text.count(BEGIN):
        raise ValueError(f"{README}: expected marks around each table, found {count} of {text.count(BEGIN)}")
    return new


def main() -> int:
    """Command line; with --check, 1 where README is not up to date."""
    old = README.read_text(encoding="utf-8")
    new = with_tables(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

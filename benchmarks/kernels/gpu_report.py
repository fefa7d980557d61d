"""Report the results of gpu_day.py as tables, and as one JSON file for benchmarks/results.

    python -m benchmarks.kernels.gpu_report DIR [--out benchmarks/results/gpu_day.json]

The time of a wrong result is marked with "!" and has no ratio.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.kernels.gpu.journal import Journal, Row

STEPS = ("probe", "smoke", "chain", "layer", "rates", "tune")
LAYER_COLUMNS = ("bf16_us", "fused_us", "plain_us", "input_us", "weight_us")


def read(folder: Path) -> dict[str, list[Row]]:
    """Return the rows of every step; an empty list for a step without results."""
    journal = Journal(folder, 0.0)
    return {step: journal.rows(step) for step in STEPS}


def number(value: object, digits: int = 1) -> str:
    """Format a figure, or "-" if there is none."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return lines with right-aligned columns."""
    cells = [list(headings), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def cases_of(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that describe a case."""
    return [row for row in rows if "case" in row]


def state(rows: Sequence[Row]) -> str:
    """Return the numbers of cases that ran, failed and were left out."""
    cases = cases_of(rows)
    bad = [row for row in cases if not row.get("ok", True)]
    left: set[str] = set()
    for row in rows:
        found = row.get("left_out", [])
        left |= {found} if isinstance(found, str) else set(found)
    left -= {row["case"] for row in cases}
    return f"{len(cases)} cases, {len(bad)} bad, {len(left)} left out"


def problems(steps: dict[str, list[Row]]) -> list[str]:
    """Return a line for each case that is wrong or failed, and for each worker that died between cases."""
    lines = []
    for step, rows in steps.items():
        for row in rows:
            if "failure" in row:
                lines.append(f"{step}: {row['failure']}")
            elif "case" in row and not row.get("ok", True):
                errors = {
                    key: row[key]
                    for key in ("codes_off_max", "scale_rel", "u_rel", "matmul_rel")
                    if key in row
                }
                false = [key for key, value in row.items() if value is False and key != "ok"]
                lines.append(f"{step}: {row['case']}: {row.get('error') or f'wrong: {errors} {false}'}")
    return lines


def layer_lines(rows: Sequence[Row]) -> list[str]:
    """Return the microseconds of each linear, BWLA's ratio to bf16, its share of a copy's bandwidth, and TOPS."""
    body = []
    for row in cases_of(rows):
        right = row.get("ok", True)
        spread = ""
        if "fused_us_low" in row and row["fused_us"]:
            spread = f"{100 * (row['fused_us_high'] - row['fused_us_low']) / row['fused_us']:.0f}%"
        body.append(
            [
                row["case"] + ("" if right else " !"),
                *(number(row.get(name)) for name in LAYER_COLUMNS),
                spread or "-",
                number(row.get("bf16_ratio"), 2) if right else "-",
                number(row.get("packed_tb_s"), 2),
                number(100 * row["copy_share"], 0) + "%" if "copy_share" in row and right else "-",
                number(row.get("tops"), 0),
                str(row.get("config", "-")),
            ]
        )
    names = [name.removesuffix("_us") for name in LAYER_COLUMNS]
    return table(["layer", *names, "spread", "x bf16", "TB/s", "of copy", "TOPS", "config"], body)


def chain_lines(rows: Sequence[Row]) -> list[str]:
    """Return the microseconds of a decoder layer and of a head; a profile's kernels follow its line."""
    lines = []
    for row in cases_of(rows):
        mark = "" if row.get("ok", True) else " !"
        if "layer_us" in row:
            text = f"{row['layer_us']:.1f} us a decoder layer, {row['linears_ms']:.3f} ms all layers' linears"
        elif "head_us" in row:
            text = f"{row['head_us']:.1f} us"
        elif "kernels" in row:
            text = "".join(f"\n    {us:8.2f} us x{count:<5} {name}" for name, count, us in row["kernels"])
        else:
            text = "-"
        lines.append(f"{row['case']}: {text}{mark}")
    return lines


def tune_lines(rows: Sequence[Row]) -> list[str]:
    """Return the fastest correct candidate of each shape and number of tokens, and the number of candidates."""
    shapes: dict[str, list[Row]] = {}
    for row in cases_of(rows):
        shapes.setdefault(" ".join(row["case"].split()[:3]), []).append(row)
    right = {key: [row for row in tried if row.get("us")] for key, tried in shapes.items()}
    best = {key: min(found, key=lambda row: row["us"]) for key, found in right.items() if found}
    return [
        f"{key}: {row['config']}, {row['us']:.2f} us, {row.get('packed_tb_s', 0):.2f} TB/s, of {len(shapes[key])} tried"
        for key, row in best.items()
    ]


def report(steps: dict[str, list[Row]]) -> list[str]:
    """Return the lines of the whole report."""
    lines = [f"{step}: {state(rows)}" for step, rows in steps.items()]
    for row in cases_of(steps["probe"]):
        facts = {key: value for key, value in row.items() if key not in ("case", "seconds", "traceback")}
        lines.append(f"{row['case']}: {facts}")
    for title, body in (
        ("Problems", problems(steps)),
        ("One decode step, linears and head", chain_lines(steps["chain"])),
        ("Layers, microseconds, weights cold", layer_lines(steps["layer"])),
        (
            "Tensor cores, TOPS",
            [f"{r['case']}: {number(r.get('tera_operations'), 0)}" for r in cases_of(steps["rates"])],
        ),
        ("Tuning", tune_lines(steps["tune"])),
    ):
        lines += ["", title, *(body or ["(none)"])]
    return lines


def result(steps: dict[str, list[Row]], folder: Path, note: str) -> Row:
    """Return the result for benchmarks/results: the probe's provenance, and all rows."""
    facts = {row["case"]: row for row in cases_of(steps["probe"])}
    return {
        "command": f"scripts/gpu_day.sh, then python -m benchmarks.kernels.gpu_report {folder}",
        "commit": facts.get("versions", {}).get("commit"),
        **({"note": note} if note else {}),
        "built_ahead": facts.get("cache", {}).get("built_ahead"),
        "machine": facts.get("gpu", {}),
        "versions": facts.get("versions", {}),
        "rows": {step: rows for step, rows in steps.items() if step != "probe"},
    }


def main() -> int:
    """Run the command line; return 1 if there are no results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of gpu_day.py's results")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--note", default="", help="note about the run for readers of the file")
    arguments = parser.parse_args()
    steps = read(arguments.folder)
    if not any(steps.values()):
        print(f"{arguments.folder}: expected STEP.jsonl of {', '.join(STEPS)}, found none", file=sys.stderr)
        return 1
    print("\n".join(report(steps)))
    if arguments.out:
        text = json.dumps(result(steps, arguments.folder, arguments.note), indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

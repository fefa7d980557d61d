"""Figures in the documents: tables with numbers are generated or say where the numbers are from; pictures are current.

A table that is not between `<!-- table: ... -->` and `<!-- end of table -->` may hold numbers outside its first column
only after a comment `<!-- stated: REASON -->`, with a reason of `REASONS`. Digits in names (bfloat16, Q1_0, Qwen3-8B),
inline code and addresses of links are no numbers.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from markdown_it import MarkdownIt
from paths import ROOT

from scripts import docs_tables, plot_results
from scripts.tables import reliability, results

DOCUMENTS = sorted({*docs_tables.DOCUMENTS, *ROOT.glob("*.md")})
REASONS = {
    "definition": "the format, a kernel or a command defines them",
    "default": "default values and limits of options",
    "example": "they belong to an example",
}
"""Where the numbers of a table that is not generated may come from. Measured numbers are not among them."""

STATED = re.compile(r"\s*<!-- stated: (\w+) -->\s*")
NUMBER = re.compile(r"(?<![\w-])[-+]?\d")
NO_NUMBER = re.compile(r"`[^`]*`|\]\([^)]*\)")


def has_number(table: list[str]) -> bool:
    """Return whether the lines of a table have a number outside their first column."""
    rows = [line.strip().strip("|").split("|")[1:] for line in table]
    return any(NUMBER.search(NO_NUMBER.sub("", cell)) for row in rows for cell in row)


def problems_of(text: str) -> Iterator[str]:
    """Yield the tables of a document that break the rule, each with the reason."""
    lines, before = text.splitlines(), ""
    generated = [
        (text.count("\n", 0, mark.start()), text.count("\n", 0, mark.end()))
        for mark in docs_tables.MARKED.finditer(text)
    ]
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            start, end = token.map or [0, 0]
            stated, number = STATED.fullmatch(before), has_number(lines[start + 2 : end])
            if any(first < start < last for first, last in generated):
                pass
            elif stated and stated[1] not in REASONS:
                yield f"line {start + 1}: expected a reason of {', '.join(REASONS)}, found {stated[1]!r}"
            elif number and not stated:
                yield f"line {start + 1}: numbers that are neither generated nor stated"
            elif stated and not number:
                yield f"line {start + 1}: expected numbers after `stated`, found none"
        before = token.content if token.type == "html_block" else ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers_in_tables_are_generated_or_stated(document: Path) -> None:
    assert list(problems_of(document.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("before", "cell", "problem"),
    [
        ("", "0.95 / 3.8 s", "neither"),
        ("", "none (0.2 kB)", "neither"),
        ("", "-3 %", "neither"),
        ("<!-- needs: time -->\n", "40 s", "neither"),
        ("", "`--bits 3` for Qwen3-8B in bfloat16, Q1_0 and [others](a-1.md)", None),
        ("<!-- stated: default -->\n", "40 s", None),
        ("<!-- stated: default -->\n", "no limit", "found none"),
        ("<!-- stated: measured -->\n", "40 s", "found 'measured'"),
        ("<!-- table: load load; scripts/docs_tables.py -->\n", "40 s", None),
        ("<!-- end of table -->\n", "40 s", "neither"),
    ],
)
def test_the_rule_finds_numbers(before: str, cell: str, problem: str | None) -> None:
    table = f"| 1 | 2 |\n|---|---|\n| 3 tokens | {cell} |"
    found = list(problems_of(f"# Title\n\n{before}{table}\n<!-- end of table -->\n"))
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


def test_the_pictures_are_those_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {
        path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "images").glob("*.svg")
    }
    if any(f"matplotlib {mpl.__version__}" not in text for text in stored.values()):
        pytest.skip("drawn by another matplotlib, whose bytes differ")
    monkeypatch.setattr(sys, "argv", ["plot_results", "--out", str(tmp_path)])
    assert plot_results.main() == 0
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    assert [name for name in {*stored, *drawn} if stored.get(name) != drawn.get(name)] == [], (
        "run python -m scripts.plot_results"
    )


def put(monkeypatch: pytest.MonkeyPatch, folder: Path, **result: Any) -> None:
    """Make `result` the only result file, called `it`."""
    (folder / "it.json").write_text(json.dumps(result))
    monkeypatch.setattr(results, "RESULTS", folder)


def test_the_load_table_has_a_column_for_each_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "load.json").read_text())["rows"]
    put(monkeypatch, tmp_path, rows=[{**rows[0], "model": name} for name in ("example", "planes", "new one")])
    header, _, *lines = reliability.load_table("it").splitlines()
    assert header == "|  | example model | example model, two planes a weight | new one |"
    assert {line.count("|") for line in lines} == {5}


def test_the_table_of_kills_has_a_line_for_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = [
        ("paper", 7, "the same bytes", 5),
        ("fast", 8, "the same bytes", 3),
        ("fast", 8, "refused: full", 1),
    ]
    rows = [dict(zip(("kind", "kills", "what", "times"), row, strict=True)) for row in ended]
    states = {"renamed": 2, "2 layers done": 3, "checking": 9, "1 layers done": 1}
    put(monkeypatch, tmp_path, rows=rows, kills=15, failures=["conversion 3: other bytes"], killed_at=states)
    assert reliability.kills_table("it").splitlines()[2:] == [
        "| paper | 7 | 5 | 0 |",
        "| fast | 8 | 3 | 1 |",
        "| together | 15 | 8 | 1 |",
        "",
        "Conversions with other bytes or an incomplete output: 1.",
    ]
    assert [line.split("|")[2].strip() for line in reliability.kill_states_table("it").splitlines()[2:]] == [
        *("9", "1", "3", "2")
    ]


def test_the_table_of_damage_shows_failures_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [
        "refused",
        "SILENT: wrong data",
        "same data, HASHES ARE EQUAL",
        "other valid data, HASHES ARE EQUAL",
    ]
    rows = [
        {"reader": "plugin", "outcome": outcome, "count": 2} for outcome in (*outcomes, "CRASH: hangs", "new")
    ]
    put(monkeypatch, tmp_path, rows=rows)
    assert reliability.damage_table("it").splitlines()[2:] == [
        "| loaded silently with wrong data | 2 | 2 |",
        "| crash in our code | 2 | 2 |",
        "| refused by us | 2 | 2 |",
        "| the same data as before the damage | 2 | 2 |",
        "| new | 2 | 2 |",
        "| other valid values, hashes equal | 2 | 2 |",
    ]

"""The journal of a step, JSON lines that are written at once, and a loop over cases that survives failing cases."""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SHORT, RESTART = 74, 75
"""Exit statuses of a worker: it ran out of time; it lost its device and must continue in a new process."""

RESERVE = 6.0
"""Seconds that must be left to start another case."""

TEXT_LIMIT = 2500
"""Number of characters at the end of a traceback that are kept."""


@dataclass(frozen=True)
class Case:
    """One measurement of a step.

    Attributes:
        name: unique within the step; a case that has a row is not run again.
        run: fills the row that it is given; entries that it sets before it fails are kept.
    """

    name: str
    run: Callable[[Row], None]


@dataclass(frozen=True)
class Journal:
    """A folder of results, one `STEP.jsonl` for each step, and a deadline in seconds since the epoch."""

    folder: Path
    deadline: float

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.time()

    def note(self, step: str, row: Row) -> None:
        """Append a row to the step's file and print it; a single write, so that several processes can append."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, default=str) + "\n"
        file = os.open(self.folder / f"{step}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
        shown = {key: _short(value) for key, value in row.items() if key != "traceback"}
        print(f"{step}: {shown}", flush=True)

    def rows(self, step: str) -> list[Row]:
        """Return all rows of the step in order; an incomplete line is skipped."""
        path = self.folder / f"{step}.jsonl"
        if not path.exists():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def done(self, step: str) -> set[str]:
        """Return the names of the cases that have a row."""
        return {row["case"] for row in self.rows(step) if "case" in row}


def _short(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value if not isinstance(value, str) or len(value) < 160 else "..." + value[-160:]


def failure_of(error: BaseException) -> Row:
    """Return the entries of a row that describe an exception."""
    text = traceback.format_exc()[-TEXT_LIMIT:]
    return {"ok": False, "error": f"{type(error).__name__}: {error}"[:600], "traceback": text}


def run_cases(
    journal: Journal,
    step: str,
    cases: Iterable[Case],
    device_is_lost: Callable[[], bool],
    begun: Path | None = None,
) -> int:
    """Run the cases that have no row yet; write exactly one row for each.

    Args:
        journal: the journal, with its deadline.
        step: name of the step.
        cases: the cases, most important first; an iterator may derive later cases from the rows of earlier ones.
        device_is_lost: called after a case that failed.
        begun: file for the name of the current case, read if this process dies.

    Returns: 0; SHORT if cases are left out (one row names them); RESTART if the process cannot continue.
    """
    done, remaining = journal.done(step), iter(cases)
    for case in remaining:
        if case.name in done:
            continue
        if journal.left() < RESERVE:
            later = [other.name for other in remaining if other.name not in done]
            journal.note(step, {"left_out": [case.name, *later]})
            return SHORT
        if begun is not None:
            begun.write_text(case.name, encoding="utf-8")
        started = time.monotonic()
        row: Row = {"case": case.name}
        try:
            case.run(row)
        except Exception as error:  # the other cases must run whatever this one raises
            row |= failure_of(error)
        row["seconds"] = round(time.monotonic() - started, 2)
        journal.note(step, row)
        if not row.get("ok", True) and device_is_lost():
            return RESTART
    return 0

"""What a step leaves behind: JSON lines, written as they come, and a loop over cases that no failing case ends."""

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
"""Exit statuses of a worker: it ran out of time; it lost its device and must go on in a new process."""

RESERVE = 6.0
"""Seconds that must be left for another case to begin."""

TEXT_LIMIT = 2500
"""Characters of a traceback that are kept, from its end."""


@dataclass(frozen=True)
class Case:
    """One measurement of a step.

    Attributes:
        name: unique in its step; a case that has a row is not run again.
        run: fills the row it is given, so that what it found before it failed is kept.
    """

    name: str
    run: Callable[[Row], None]


@dataclass(frozen=True)
class Journal:
    """A folder of results, `STEP.jsonl` each, and a deadline in seconds since the epoch."""

    folder: Path
    deadline: float

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def note(self, step: str, row: Row) -> None:
        """Append a row to the step's file and print it; one write, so that several processes may."""
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
        """Every row that the step has written, in order; a line that was cut off is left out."""
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
        """Names of the cases that have a row."""
        return {row["case"] for row in self.rows(step) if "case" in row}


def _short(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value if not isinstance(value, str) or len(value) < 160 else "..." + value[-160:]


def failure_of(error: BaseException) -> Row:
    """What a row says about an exception."""
    text = traceback.format_exc()[-TEXT_LIMIT:]
    return {"ok": False, "error": f"{type(error).__name__}: {error}"[:600], "traceback": text}


def run_cases(
    journal: Journal,
    step: str,
    cases: Iterable[Case],
    device_is_lost: Callable[[], bool],
    begun: Path | None = None,
) -> int:
    """Run the cases that have no row yet; each leaves exactly one.

    Args:
        journal: where the rows go, and the deadline.
        step: the journal's file.
        cases: most important first; taken one by one, so that later ones may follow from earlier ones' rows.
        device_is_lost: asked after a case that failed.
        begun: a file that names the case at work, for whoever finds this process dead.

    Returns: 0; SHORT if cases are left out (one row names them); RESTART if the process is of no more use.
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
        except Exception as error:  # whatever a case raises, the others must run
            row |= failure_of(error)
        row["seconds"] = round(time.monotonic() - started, 2)
        journal.note(step, row)
        if not row.get("ok", True) and device_is_lost():
            return RESTART
    return 0

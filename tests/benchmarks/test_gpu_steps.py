"""The steps of a day: a worker that dies or hangs costs its case and no other; a step keeps its limit."""

import time
from pathlib import Path

import pytest
from paths import ROOT

from benchmarks.kernels.gpu import steps
from benchmarks.kernels.gpu.journal import Journal
from benchmarks.kernels.gpu.steps import Day, Step

RUNNER = """
import os, signal, sys, time
from pathlib import Path
from benchmarks.kernels.gpu.journal import RESTART, Case, Journal, run_cases

step, words = sys.argv[1], sys.argv[2:]
options = dict(zip(words[::2], words[1::2]))
journal = Journal(Path(options["--out"]), float(options["--until"]))

def die(row): os.kill(os.getpid(), signal.SIGKILL)
def hang(row): time.sleep(600)
def lose(row): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def fine(row): pass

kinds = {"good": [fine, fine], "dies": [die, fine], "loses": [lose, lose, fine], "hangs": [fine, hang]}
if step == "broken":
    sys.exit(3)
worker, workers = map(int, options["--worker"].split("/"))
cases = [Case(f"{function.__name__} {number}", function) for number, function in enumerate(kinds[step])]
lost = step == "loses"
sys.exit(run_cases(journal, step, cases[worker::workers], lambda: lost, Path(options["--mark"])))
"""


@pytest.fixture
def day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Day:
    """A day on a "GPU" whose worker is a small script."""
    (tmp_path / "runner.py").write_text(RUNNER)
    monkeypatch.setattr(steps, "RUNNER", (str(tmp_path / "runner.py"),))
    journal = Journal(tmp_path / "out", time.time() + 1000)
    return Day(journal, on_gpu=True, environment={"PYTHONPATH": str(ROOT)})


def cases(day: Day, step: str) -> dict[str, bool]:
    return {row["case"]: row.get("ok", True) for row in day.journal.rows(step) if "case" in row}


def test_workers_share_the_cases(day: Day) -> None:
    day.run([Step("good", 60, workers=2)])
    assert cases(day, "good") == {"fine 0": True, "fine 1": True}


def test_a_dead_worker_costs_its_case(day: Day) -> None:
    day.run([Step("dies", 60), Step("good", 60)])
    assert cases(day, "dies") == {"die 0": False, "fine 1": True}
    assert "status -9" in day.journal.rows("dies")[0]["error"]
    assert cases(day, "good") == {"fine 0": True, "fine 1": True}


def test_a_lost_device_costs_its_case(day: Day) -> None:
    day.run([Step("loses", 60)])
    assert cases(day, "loses") == {"lose 0": False, "lose 1": False, "fine 2": True}
    assert len(day.journal.rows("loses")) == 3


def test_a_worker_that_hangs_is_ended_at_the_limit(day: Day) -> None:
    day.run([Step("hangs", 12), Step("good", 60)])
    assert cases(day, "hangs") == {"fine 0": True, "hang 1": False}
    assert day.journal.rows("hangs")[-1]["error"] == "did not end in time"
    assert len(cases(day, "good")) == 2


def test_a_worker_that_cannot_start_is_not_tried_for_ever(day: Day) -> None:
    day.run([Step("broken", 60)])
    (row,) = day.journal.rows("broken")
    assert row["failure"] == "worker 0: ended its process with status 3"


def test_without_time_no_step_begins(day: Day) -> None:
    late = Day(Journal(day.journal.folder, time.time() + 1), on_gpu=True, environment={})
    late.run([Step("good", 60), Step("hangs", 60)])
    assert late.journal.rows("good") == [{"left_out": "the whole step: no time left"}]
    assert late.journal.rows("hangs") == [{"left_out": "the whole step: no time left"}]


def test_the_steps_fit_into_nine_minutes() -> None:
    assert steps.TOTAL <= 9 * 60

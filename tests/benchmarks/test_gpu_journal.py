"""The loop over a step's cases: one row each, whatever a case does, and nothing twice."""

import time
from pathlib import Path

import pytest

from benchmarks.kernels.gpu.checks import Limits, is_right
from benchmarks.kernels.gpu.journal import RESERVE, RESTART, SHORT, Case, Journal, Row, run_cases


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "out", time.time() + 1000)


def good(row: Row) -> None:
    row["us"] = 1.5


def bad(row: Row) -> None:
    row["found"] = 7
    raise ValueError("expected 1, found 2")


def run(journal: Journal, *cases: Case, lost: bool = False, begun: Path | None = None) -> int:
    return run_cases(journal, "step", cases, lambda: lost, begun)


def test_a_failing_case_is_recorded_and_the_next_runs(journal: Journal, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    assert run(journal, Case("a", bad), Case("b", good), begun=mark) == 0
    first, second = journal.rows("step")
    assert (first["case"], first["ok"], first["found"]) == ("a", False, 7)
    assert first["error"] == "ValueError: expected 1, found 2"
    assert "in bad" in first["traceback"]
    assert (second["case"], second["us"]) == ("b", 1.5)
    assert mark.read_text() == "b"


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on(journal: Journal) -> None:
    cases = (Case("a", bad), Case("b", bad), Case("c", good))
    assert run(journal, *cases, lost=True) == RESTART
    assert run(journal, *cases, lost=True) == RESTART
    assert run(journal, *cases, lost=True) == 0
    assert [row["case"] for row in journal.rows("step")] == ["a", "b", "c"]


def test_without_time_the_rest_is_named(journal: Journal) -> None:
    run(journal, Case("a", good))
    late = Journal(journal.folder, time.time() + RESERVE / 2)
    assert run(late, Case("a", good), Case("b", good), Case("c", good)) == SHORT
    assert late.rows("step")[-1] == {"left_out": ["b", "c"]}


def test_later_cases_may_follow_from_earlier_rows(journal: Journal) -> None:
    def cases():  # type: ignore[no-untyped-def]
        yield Case("a", good)
        yield Case(f"after {journal.rows('step')[-1]['us']}", good)

    assert run_cases(journal, "step", cases(), lambda: False) == 0
    assert journal.done("step") == {"a", "after 1.5"}


def test_a_line_that_was_cut_off_is_no_row(journal: Journal) -> None:
    run(journal, Case("a", good))
    path = journal.folder / "step.jsonl"
    path.write_text(path.read_text() + '{"case": "b", "us": 1')
    assert journal.done("step") == {"a"}


def test_right_is_within_every_limit() -> None:
    limits = Limits(matmul=1e-3, codes_share=0.01, codes=1, scale=1e-4)
    row: Row = {
        "matmul_rel": 1e-4,
        "codes_off_share": 0.0,
        "codes_off_max": 1,
        "scale_rel": 0.0,
        "q_sum_ok": True,
    }
    assert is_right(row, limits)
    for change in ({"matmul_rel": float("nan")}, {"codes_off_max": 2}, {"q_sum_ok": False}, {"u_rel": 0.1}):
        assert not is_right({**row, **change}, limits)

"""A short fuzz run: no reader crashes or loads damaged data, and the judge recognizes readers that do."""

from pathlib import Path

import pytest
import torch

from tests.robustness.fuzz import Case, is_failure, judge, run
from tests.robustness.kinds import MAY_PASS, MUST_REFUSE

COUNT = 3 * len([*MUST_REFUSE, *MAY_PASS])


@pytest.mark.slow
def test_every_kind_of_damage_on_every_reader(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = run(COUNT, seed=1, work=tmp_path)
    finally:
        torch.set_num_threads(before)
    assert [case for case in cases if is_failure(case)] == []
    assert {case.reader for case in cases} == {"converter", "plugin", "transformers"}
    assert sum(case.outcome == "refused" for case in cases) > COUNT // 2
    hosts = [case for case in cases if case.outcome == "crash of its host"]
    # transformers reads config.json before it calls our code, and crashes if that is not an object.
    assert {case.mutation for case in hosts} <= {"config_of_another_kind", "change_config_value"}


@pytest.mark.parametrize(
    ("tensors", "outcome"),
    [
        ({"a": torch.ones(2)}, "SILENT: damage not detected"),
        ({"a": torch.zeros(2)}, "SILENT: wrong data"),
        ({"a": torch.full((2,), float("nan"))}, "SILENT: not finite"),
    ],
)
def test_a_reader_that_lets_damage_through_is_caught(tensors, outcome: str, tmp_path: Path) -> None:
    from tests.robustness.fuzz import digest

    good = digest({"a": torch.ones(2)})
    assert judge(lambda folder: tensors, tmp_path, good, must_refuse=True)[0] == outcome
    assert is_failure(Case(0, "", "", "", outcome))


def test_a_reader_that_crashes_is_caught(tmp_path: Path) -> None:
    from bwla_kernels.format.schema import longest_suffix

    def crash(folder: Path) -> dict[str, torch.Tensor]:
        return {"a": longest_suffix(7, "x")}  # type: ignore[arg-type]

    outcome, message = judge(crash, tmp_path, {}, must_refuse=True)
    assert outcome == "CRASH"
    assert "TypeError" in message

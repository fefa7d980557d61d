"""The compile check's table: what a merge keeps, what the file holds."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from bwla_kernels.errors import BackendError
from bwla_kernels.triton.compile_table import Row, key_of, merge, read_rows, summary, write_rows


def row(config: str, registers: int = 64, arch: int = 90) -> Row:
    return {
        "kernel": "kernel",
        "config": config,
        "arch": arch,
        "registers": registers,
        "spills": 0,
        "stack": 0,
        "shared_bytes": 1024,
        "tensor_core": "IMMA",
        "instructions_per_weight": 0.5,
    }


def test_merge_replaces_completes_and_drops() -> None:
    old, new = [row("a"), row("b"), row("gone")], [row("b", 128), row("c")]
    exists = [key_of(one) for one in (row("a"), row("b"), row("c"), row("never compiled"))]
    merged = merge(old, new, exists)
    assert [(one["config"], one["registers"]) for one in merged] == [("a", 64), ("b", 128), ("c", 64)]


def test_file_holds_a_row_a_line(tmp_path: Path) -> None:
    rows = [row("a"), row("b", 128, arch=80)]
    path = tmp_path / "new" / "table.json"
    write_rows(path, rows, "command")
    assert read_rows(path) == rows
    content = json.loads(path.read_text())
    assert content["command"] == "command"
    assert content["triton"] == version("triton")
    assert len(content["summary"]) == 2
    assert sum('"config"' in line for line in path.read_text().splitlines()) == 2
    write_rows(path, [], "command")
    assert read_rows(path) == []


def test_tables_of_two_tritons_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_rows(path, [row("a")], "command")
    path.write_text(path.read_text().replace(f'"triton": "{version("triton")}"', '"triton": "2.0.0"'))
    with pytest.raises(BackendError, match="found one made with 2.0.0: use a separate file for each Triton"):
        read_rows(path)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"rows": [{"kernel": 1}]}', '{"rows": [7]}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(BackendError, match="remove --merge"):
        read_rows(path)


def test_summary_states_the_worst() -> None:
    (line,) = summary([row("a"), row("b", 200), {**row("c"), "spills": 3, "instructions_per_weight": None}])
    assert line == (
        "sm_90 kernel: 3 configurations, at most 200 registers and 1024 bytes of shared memory, 3 spills, "
        "0.500 to 0.500 instructions per weight"
    )

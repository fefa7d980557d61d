"""The whole day, tiny in Triton's interpreter: where all is well, and where no kernel runs at all."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bwla_kernels.triton.tuning import load_table
from paths import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(out: Path, *words: str, **environment: str) -> str:
    """Run the day and its report; returns the report."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    for script, arguments in (
        ("gpu_day", ["--cpu", "--out", str(out), *words]),
        ("gpu_report", [str(out)]),
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.kernels.{script}", *arguments],
            cwd=ROOT, env=variables, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(out: Path, step: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / f"{step}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_good_day(tmp_path: Path) -> None:
    report = run(tmp_path, TRITON_INTERPRET="1")
    for step, least in (("probe", 4), ("smoke", 5), ("chain", 5), ("layer", 4), ("tune", 4)):
        found = rows(tmp_path, step)
        assert len(found) >= least
        assert all(row.get("ok", True) for row in found), found
    for row in rows(tmp_path, "layer"):
        assert {
            "fused_us",
            "plain_us",
            "input_us",
            "weight_us",
            "bf16_us",
            "bf16_ratio",
            "copy_share",
        } <= row.keys()
    table = json.loads((tmp_path / "tuning.json").read_text())
    for shape in ("128x64/1", "128x64/1/3"):
        assert set(table["architectures"]["90"]["shapes"][shape]) == {"1"}
    assert len(list(tmp_path.iterdir())) <= 8
    assert "Problems\n(none)" in report


@pytest.mark.slow
def test_a_day_on_which_no_kernel_runs(tmp_path: Path) -> None:
    report = run(tmp_path, "smoke", "chain", "layer", "tune", TRITON_INTERPRET="0")
    for step in ("smoke", "layer", "tune"):
        found = rows(tmp_path, step)
        assert found
        assert not any(row["ok"] for row in found)
        assert all("RuntimeError" in str(row["error"]) for row in found)
    assert all("bf16_us" in row for row in rows(tmp_path, "layer"))
    heads = {row["head"]: row["ok"] for row in rows(tmp_path, "chain") if "head" in row}
    assert heads == {"triton": False, "bf16": True, "torch": True}
    assert "layer: 4 cases, 4 bad, 0 left out" in report
    written = json.loads((tmp_path / "tuning.json").read_text())
    assert written["architectures"] == load_table()["architectures"]


@pytest.mark.slow
def test_a_day_that_is_too_short(tmp_path: Path) -> None:
    report = run(tmp_path, "smoke", "chain", "--seconds", "11")
    assert "left out" in report
    assert rows(tmp_path, "chain")[-1] == {"left_out": "the whole step: no time left"}

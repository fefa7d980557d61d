"""What the report says of results that are missing, wrong or right."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import gpu_report
from benchmarks.kernels.gpu.cache import relocate

ROWS = {
    "probe": [{"case": "versions", "commit": "abc"}, {"case": "gpu", "name": "H100"}],
    "smoke": [{"case": "a", "ok": True}, {"case": "b", "ok": False, "matmul_rel": 0.5, "graph_ok": False},
              {"left_out": ["c", "d"]}],
    "chain": [{"case": "32b m=1 in turn", "layer_us": 60.0, "linears_ms": 3.84, "ok": True}],
    "layer": [{"case": "32b qkv m=1", "ok": True, "fused_us": 10.0, "fused_us_low": 9.0, "fused_us_high": 11.0,
               "bf16_us": 40.0, "bf16_ratio": 4.0, "copy_share": 0.25, "config": "x"},
              {"case": "32b o m=1", "ok": False, "fused_us": 10.0, "bf16_ratio": 4.0, "copy_share": 0.5},
              {"case": "32b down m=1", "ok": False, "error": "OutOfResources: shared memory"}],
    "tune": [{"case": "32b qkv m=1 a", "config": "a", "us": 5.0}, {"case": "32b qkv m=1 b", "config": "b", "us": 4.0},
             {"case": "32b qkv m=1 c", "config": "c", "us": None, "ok": False, "error": "wrong by 1"}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step, rows in ROWS.items():
        (tmp_path / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_report(folder: Path) -> None:
    text = "\n".join(gpu_report.report(gpu_report.read(folder)))
    assert "smoke: 2 cases, 1 bad, 2 left out" in text
    assert "smoke: b: wrong: {'matmul_rel': 0.5} ['graph_ok']" in text
    assert "layer: 32b down m=1: OutOfResources: shared memory" in text
    assert "60.0 us a decoder layer, 3.840 ms all layers' linears" in text
    assert "32b qkv m=1: b, 4.00 us, 0.00 TB/s, of 3 tried" in text
    (right,) = [line for line in text.splitlines() if "32b qkv m=1  " in line]
    assert right.split()[3:] == ["40.0", "10.0", "-", "-", "-", "20%", "4.00", "-", "25%", "-", "x"]
    (wrong,) = [line for line in text.splitlines() if "32b o m=1 !" in line]
    assert "4.00" not in wrong
    assert "50%" not in wrong


def test_result_keeps_every_row(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(folder), "--out", str(out)])
    assert gpu_report.main() == 0
    found = json.loads(out.read_text())
    assert found["commit"] == "abc"
    assert found["machine"]["name"] == "H100"
    assert found["rows"]["tune"] == ROWS["tune"]


def test_nothing_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path)])
    assert gpu_report.main() == 1


def test_a_moved_cache_names_its_files_where_they_are(tmp_path: Path) -> None:
    kernel = tmp_path / "KEY"
    kernel.mkdir()
    group = {"child_paths": {"k.cubin": "/elsewhere/KEY/k.cubin", "k.json": "/elsewhere/KEY/k.json"}}
    (kernel / "__grp__k.json").write_text(json.dumps(group))
    assert relocate(tmp_path) == 1
    found = json.loads((kernel / "__grp__k.json").read_text())["child_paths"]
    assert found == {"k.cubin": str(kernel / "k.cubin"), "k.json": str(kernel / "k.json")}

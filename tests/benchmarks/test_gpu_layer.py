"""What gpu_layer.py makes of its cases: one row a linear with every method's time, and a list of what is missing."""

from benchmarks.kernels.gpu.journal import Row
from benchmarks.kernels.gpu.shapes import GPU
from benchmarks.kernels.gpu_layer import cases, merged
from benchmarks.kernels.gpu_peers import PEERS


def test_rows_are_joined() -> None:
    rows: list[Row] = [
        {"case": "32b o m=1", "fused_us": 4.0, "ok": True},
        {"case": "32b o m=8", "ok": False, "error": "OutOfResources: shared memory"},
        {"case": "32b o m=1 marlin_int4", "marlin_int4_us": 9.0},
        {"case": "32b o m=8 marlin_int4", "marlin_int4_us": 9.5},
        {
            "case": "32b o m=1 humming_w1a8",
            "ok": False,
            "error": "ModuleNotFoundError: No module named 'humming'",
        },
        {"left_out": ["32b o m=8 humming_w1a8"]},
    ]
    found, missing = merged(rows)
    assert found == [
        {"case": "32b o m=1", "fused_us": 4.0, "ok": True, "marlin_int4_us": 9.0},
        {**rows[1], "marlin_int4_us": 9.5},
    ]
    assert missing == [
        "32b o m=8: OutOfResources: shared memory",
        "32b o m=1 humming_w1a8: ModuleNotFoundError: No module named 'humming'",
        "no time left for ['32b o m=8 humming_w1a8']",
    ]


def test_bwla_comes_before_the_other_methods() -> None:
    names = [case.name for case in cases(["8b"], (1, 8), PEERS[1:2], GPU)]
    assert len(names) == len(set(names))
    assert names[:2] == ["8b qkv m=1", "8b qkv m=8"]
    assert names[8] == f"8b qkv m=1 {PEERS[1].name}"
    assert "8b o m=1 separate" not in names  # nothing stands before it
    assert "8b down m=1 separate" in names


def test_several_planes_are_measured_without_other_methods() -> None:
    names = [case.name for case in cases(["8b", "8b-2p"], (1,), PEERS[1:2], GPU)]
    assert "8b-2p qkv m=1" in names
    assert f"8b qkv m=1 {PEERS[1].name}" in names
    assert f"8b-2p qkv m=1 {PEERS[1].name}" not in names

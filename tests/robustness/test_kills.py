"""Conversions that are interrupted or killed; `tests/robustness/kill_resume.py` also does long runs."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bwla_converter.resume.manifest import read_manifest
from bwla_converter.resume.work_folder import MANIFEST, work_path
from paths import ROOT

pytestmark = pytest.mark.slow


def test_ctrl_c_finishes_the_layer_and_says_how_to_continue(make_model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "bwla_converter",
        str(make_model()),
        str(out),
        "--recipe",
        "data-free",
        "--rank",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    output = ""
    while "q_proj  relative error" not in output:
        line = process.stderr.readline()
        assert line, output
        output += line
    process.send_signal(signal.SIGINT)
    output += process.stderr.read()
    assert process.wait() == 130, output
    assert "finishing layer 0 before stopping" in output
    assert "was not written; the finished layers are in" in output
    assert "add --resume to the same command to continue" in output
    assert list(read_manifest(work_path(out) / MANIFEST).layers) == ["0"]
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert "resumed: 1 layers are finished already" in done.stderr
    assert (out / "config.json").is_file()
    assert not work_path(out).exists()


def test_kills_at_random_moments_end_in_the_same_bytes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.robustness.kill_resume",
        "--kills",
        "5",
        "--recipes",
        "data-free",
        "paper",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills, 0 failures" in done.stdout

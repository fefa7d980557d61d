"""The script behind `make demo`, from the conversion to the answer of an OpenAI client."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = pytest.mark.slow


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.demo", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def processes_using(folder: Path) -> list[str]:
    """Return the command lines of processes that contain `folder`."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words:
            commands.append(words)
    return commands


def test_demo_ends_with_ok_and_leaves_nothing_running(tmp_path: Path) -> None:
    done = run_demo("--out", str(tmp_path / "out"), "--windows", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(
        r"demo: ok - perplexity [\d.]+ -> [\d.]+ \(x [\d.]+\), [\d.]+ bits per weight, \d+ seconds", last
    )
    assert processes_using(tmp_path) == []


def test_demo_fails_loudly_when_a_step_fails(tmp_path: Path) -> None:
    done = run_demo("--model", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "demo: FAILED: bwla-convert failed" in done.stderr
    assert "demo: ok" not in done.stdout

"""Conversions that are interrupted or killed; `tests/robustness/kill_resume.py` also does long runs."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bwla_converter import pipeline
from bwla_converter.cli import convert as command
from bwla_converter.options import Options
from bwla_converter.resume.manifest import read_manifest
from bwla_converter.resume.work_folder import MANIFEST, work_path
from paths import ROOT

from tests.robustness.conversions import KINDS, Case, convert_alone, make_touch_up


@pytest.mark.slow
def test_ctrl_c_finishes_the_layer_and_says_how_to_continue(make_model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
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
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
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
    done = subprocess.run([*words, "--resume"], capture_output=True, text=True, check=True)
    assert "resumed: 1 layers are finished already" in done.stderr
    assert (out / "config.json").is_file()
    assert not work_path(out).exists()


@pytest.mark.slow
def test_kills_at_random_moments_end_in_the_same_bytes(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "tests.robustness.kill_resume",
        "--kills",
        "5",
        "--kinds",
        "data-free",
        "planes by bits",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills, 0 failures" in done.stdout


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.touched_up])
def test_a_kind_means_the_same_to_python_and_to_the_command_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Options] = []
    monkeypatch.setattr(command, "_convert", lambda console, options, gpus: found.append(options))
    case, out = Case(name, overwrite=True), tmp_path / "out"
    command.app(case.arguments(tmp_path, out), standalone_mode=False)
    assert found == [case.options(tmp_path, out)]


@pytest.mark.parametrize(("touched_up", "factory"), [(True, make_touch_up), (False, None)])
def test_the_final_step_belongs_to_its_kind(
    touched_up: bool, factory: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BWLA_CACHE", "")
    made = []
    monkeypatch.setattr(pipeline, "convert", lambda options, recipe_factory: made.append(recipe_factory))
    for name, kind in KINDS.items():
        if kind.touched_up == touched_up:
            case = Case(name, overwrite=False)
            convert_alone(case, case.options(tmp_path, tmp_path / "out"))
    assert made
    assert set(made) == {factory}

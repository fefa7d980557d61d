"""The public Python API."""

import subprocess
import sys
from pathlib import Path

import bwla_converter
import pytest
from bwla_converter import BWLAError, Options, convert


def test_every_public_name_can_be_imported() -> None:
    for name in bwla_converter.__all__:
        assert getattr(bwla_converter, name).__name__ == name
    assert dir(bwla_converter) == sorted(bwla_converter.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = bwla_converter.nothing  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, bwla_converter; print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_convert_writes_a_checkpoint_and_returns_its_summary(make_model, tmp_path: Path) -> None:
    summary = convert(Options(str(make_model()), tmp_path / "out", rank=2, recipe="data-free"))
    assert summary.rank == 2
    assert (tmp_path / "out" / "config.json").is_file()


def test_errors_are_of_one_public_class(tmp_path: Path) -> None:
    with pytest.raises(BWLAError, match="nothing"):
        convert(Options(str(tmp_path / "nothing"), tmp_path / "out", recipe="data-free"))

"""The distribution: what the wheel holds, and which top-level names an install makes importable."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("kernels", "converter", "bwla_vllm", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, without what earlier builds left there."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            )
        else:
            shutil.copyfile(source, folder / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_three_packages_and_no_other_names(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"bwla_kernels", "bwla_converter", "bwla_vllm"}
    assert "bwla_kernels/format/layer.py" in names
    assert not [name for name in names if "test" in name]


def test_the_wheel_works_and_shadows_nothing(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import importlib.util as u, bwla_kernels, bwla_converter, bwla_vllm, bwla_kernels.ops as ops; "
        f"assert all(m.__file__.startswith({str(tmp_path)!r}) for m in (bwla_kernels, bwla_converter, bwla_vllm)); "
        "assert u.find_spec('kernels') is None and u.find_spec('converter') is None; "
        "print([b.name for b in ops.backends()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_install_under_test_shadows_nothing(tmp_path: Path) -> None:
    code = "import importlib.util as u; assert u.find_spec('kernels') is u.find_spec('converter') is None"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_entry_points() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="bwla")
    assert plugin.value == "bwla_vllm:register"
    (command,) = entry_points(group="console_scripts", name="bwla-convert")
    assert command.value == "bwla_converter.cli:main"

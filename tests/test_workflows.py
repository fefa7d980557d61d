"""The hosted workflows, which run nowhere else: what they name exists, and they follow the rules for all of them."""

import fnmatch
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from paths import ROOT

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS: dict[str, dict[str, Any]] = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yml"))
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = [
    found[1]
    for line in PYPROJECT["project"]["classifiers"]
    if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))
]
PINNED = re.compile(r"uses: [\w-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)+")
CALLED = "./.github/workflows/"

all_workflows = pytest.mark.parametrize("name", WORKFLOWS)


def jobs(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = WORKFLOWS[name]["jobs"]
    return found


def steps(name: str) -> Iterator[dict[str, Any]]:
    """The steps of a workflow and of those that it calls."""
    for job in jobs(name).values():
        yield from job.get("steps", ())
        if "uses" in job:
            yield from steps(job["uses"].removeprefix(CALLED))


def commands(name: str) -> list[str]:
    return [step["run"] for step in steps(name) if "run" in step]


def test_the_workflows_are_found() -> None:
    assert {"ci.yml", "nightly.yml", "package.yml", "release.yml"} == set(WORKFLOWS)
    assert all(commands(name) for name in WORKFLOWS)


@all_workflows
def test_make_targets_exist(name: str) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {word for run in commands(name) for word in re.findall(r"\bmake (\w+)", run)} <= set(targets)


@all_workflows
def test_scripts_and_their_options_exist(name: str) -> None:
    for run in commands(name):
        for script in re.findall(r"\bscripts[./]\w+", run):
            path = ROOT / f"{script.replace('.', '/')}.py"
            assert path.is_file(), f"{name}: {run}"
            source = path.read_text(encoding="utf-8")
            for option in re.findall(r"(?<!\S)--[a-z-]+", run):
                assert f'"{option}"' in source or "uv pip" in run, f"{name}: {path.name} has no {option}"


@all_workflows
def test_called_workflows_exist_and_have_the_inputs(name: str) -> None:
    for job in jobs(name).values():
        if "uses" in job:
            called = WORKFLOWS[job["uses"].removeprefix(CALLED)]
            inputs = called[True]["workflow_call"]["inputs"]  # YAML 1.1 reads the key `on` as true
            assert set(job.get("with", ())) <= set(inputs)


@all_workflows
def test_downloaded_artifacts_are_uploaded(name: str) -> None:
    uploaded = [step["with"]["name"] for step in steps(name) if "upload-artifact@" in step.get("uses", "")]
    assert len(uploaded) == len(set(uploaded))
    for step in steps(name):
        if "download-artifact@" in step.get("uses", ""):
            wanted = step["with"].get("name") or step["with"]["pattern"]
            assert fnmatch.filter(uploaded, wanted), f"{name}: nothing uploads {wanted}"


@all_workflows
def test_the_python_versions_are_those_of_the_classifiers(name: str) -> None:
    for title, job in jobs(name).items():
        matrix = job.get("strategy", {}).get("matrix", {})
        assert matrix.get("python", PYTHONS) == PYTHONS, f"{name}: {title}"
    for step in steps(name):
        if "setup-python@" in step.get("uses", ""):
            assert step["with"]["python-version"] in ("${{ matrix.python }}", PYTHONS[0])


def test_the_tests_and_the_wheel_run_on_every_python() -> None:
    assert PYPROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert jobs("ci.yml")["test"]["strategy"]["matrix"]["python"] == PYTHONS
    assert jobs("package.yml")["test"]["strategy"]["matrix"]["python"] == PYTHONS
    build = PYPROJECT["tool"]["cibuildwheel"]["build"]
    assert build == [f"cp{version.replace('.', '')}-manylinux_x86_64" for version in PYTHONS]


@all_workflows
def test_actions_are_pinned_by_commit(name: str) -> None:
    lines = re.findall(r"uses: .+", (FOLDER / name).read_text(encoding="utf-8"))
    assert not [line for line in lines if not PINNED.fullmatch(line) and f"uses: {CALLED}" not in line]


def test_each_action_has_one_version() -> None:
    text = "".join((FOLDER / name).read_text(encoding="utf-8") for name in WORKFLOWS)
    pins: dict[str, set[str]] = {}
    for action, pin in re.findall(r"uses: ([\w./-]+)@(.+)", text):
        pins.setdefault(action, set()).add(pin)
    assert {action: found for action, found in pins.items() if len(found) > 1} == {}


@all_workflows
def test_jobs_end_and_may_only_read(name: str) -> None:
    """A job that needs more than to read the repository asks for it itself; only the release has such jobs."""
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    for title, job in jobs(name).items():
        assert "uses" in job or job["timeout-minutes"] <= 180, f"{name}: {title}"
        assert "permissions" not in job or (name, title) in {
            ("release.yml", "pypi"),
            ("release.yml", "github"),
        }


def test_the_other_files_of_github_are_yaml() -> None:
    paths = [path for path in (ROOT / ".github").rglob("*.yml") if path.parent != FOLDER]
    assert paths
    assert all(isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict) for path in paths)


def test_the_release_page_lists_the_environment_of_the_workflow() -> None:
    environment = jobs("release.yml")["pypi"]["environment"]["name"]
    page = (ROOT / "docs" / "developer" / "releasing.md").read_text(encoding="utf-8")
    assert f"`{environment}`" in page
    assert "`release.yml`" in page

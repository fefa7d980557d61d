"""The rules of the house that a parser can check: sizes of folders, files and functions, and the words we use."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PACKAGES = ("kernels", "converter", "bwla_vllm")
TREES = (*PACKAGES, "benchmarks", "scripts", "examples", "tests")
MOST_FILES = 13
"""A dozen modules beside `__init__.py`."""

LARGE_FOLDERS = {"kernels/triton", "kernels/cpu"}
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 80, 8


def python_files(*trees: str) -> list[Path]:
    found = [
        path for tree in trees for path in sorted((ROOT / tree).rglob("*.py")) if "mypy" not in path.parts
    ]
    assert found
    return found


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([argument for argument in listed if argument.arg not in ("self", "cls")])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_holds_more_than_a_dozen_modules(package: str) -> None:
    folders = {path.parent for path in python_files(package)}
    sizes = {folder.relative_to(ROOT).as_posix(): len(list(folder.glob("*.py"))) for folder in folders}
    assert not {name: size for name, size in sizes.items() if size > MOST_FILES and name not in LARGE_FOLDERS}


@pytest.mark.parametrize("tree", TREES)
def test_no_file_is_longer_than_people_read(tree: str) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(tree)}
    assert not {path.name: length for path, length in lengths.items() if length > MOST_LINES}


@pytest.mark.parametrize("tree", [tree for tree in TREES if tree not in ("kernels", "tests")])
def test_functions_are_short_and_take_few_parameters(tree: str) -> None:
    problems = []
    for path in python_files(tree):
        for function in functions_of(path):
            lines, parameters = (function.end_lineno or 0) - function.lineno + 1, parameters_of(function)
            if lines > MOST_FUNCTION_LINES or parameters > MOST_PARAMETERS:
                place = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
                problems.append(f"{place}: {lines} lines, {parameters} parameters")
    assert not problems

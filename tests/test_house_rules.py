"""House rules that a parser can check: sizes of folders, files and functions, imports, and vocabulary."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PACKAGES = ("kernels", "converter", "bwla_vllm")
TREES = (*PACKAGES, "benchmarks", "scripts", "examples", "tests")
MAX_FILES = 13
"""A dozen modules and `__init__.py`."""

LARGE_FOLDERS = {"kernels/triton", "kernels/cpu"}
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 80, 8

REPLACED_TERMS = {
    r"\ball-in\b": "bits per weight, everything counted",
    r"\bledger\b": "bits per weight, everything counted",
    r"\bexpected_pull\b": "procrustes_target",
    r"\bfeed_back\b": "gptq_signs",
    r"\bmade dense\b": "dequantized",
    r"\bwished_?\w*": "preferred",
    r"\btold\b": "the thing itself: report, options, ...",
    r"\blast norm\b(?! as it was)": "final norm",  # the label of one row in results that exist
    r"\bmetric H\b": "Hessian",
    r"\b(input|weight) side\b": "input transform, GEMM",
    r"\b(un|up)?widened\b|\bas_stored\b": "to_compute_dtype, to_storage_dtype",
    r"\bmoments\.(crossed|drift|seen)\b|\bself\.(crossed|drift)\b": "cross_gram, error_cross_gram, gram",
    r"\b(equals?|than|against|with|from|by|as|to|for|is|is not|what) the definition\b(?! of)"
    r"|\bthe definition('s\b| itself| gives| answers| does)|\"\"\"The definition\b": "reference implementation",
}
"""Regular expressions of terms that only insiders know, and what is written instead."""


def python_files(*trees: str) -> list[Path]:
    files = [
        path for tree in trees for path in sorted((ROOT / tree).rglob("*.py")) if "mypy" not in path.parts
    ]
    assert files
    return files


def documents() -> list[Path]:
    """The documents except the changelog, which quotes the terms of its time."""
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return [path for path in paths if path.name != "CHANGELOG.md"]


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([argument for argument in named if argument.arg not in ("self", "cls")])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_holds_more_than_a_dozen_modules(package: str) -> None:
    folders = {path.parent for path in python_files(package)}
    sizes = {folder.relative_to(ROOT).as_posix(): len(list(folder.glob("*.py"))) for folder in folders}
    assert not {name: size for name, size in sizes.items() if size > MAX_FILES and name not in LARGE_FOLDERS}


@pytest.mark.parametrize("tree", TREES)
def test_no_file_is_too_long(tree: str) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(tree)}
    assert not {path.name: length for path, length in lengths.items() if length > MAX_LINES}


@pytest.mark.parametrize("tree", [tree for tree in TREES if tree not in ("kernels", "tests")])
def test_functions_are_short_and_take_few_parameters(tree: str) -> None:
    problems = []
    for path in python_files(tree):
        for function in functions_of(path):
            lines, parameters = (function.end_lineno or 0) - function.lineno + 1, count_parameters(function)
            if lines > MAX_FUNCTION_LINES or parameters > MAX_PARAMETERS:
                place = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
                problems.append(f"{place}: {lines} lines, {parameters} parameters")
    assert not problems


@pytest.mark.parametrize("tree", TREES)
def test_no_file_changes_the_import_path(tree: str) -> None:
    pattern = re.compile(r"sys\.path\.(insert|append|remove)|syspath_prepend")
    paths = [path for path in python_files(tree) if path != Path(__file__)]
    assert not [
        str(path.relative_to(ROOT)) for path in paths if pattern.search(path.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("tree", [*TREES, "documents"])
def test_no_insiders_term_is_used(tree: str) -> None:
    problems = []
    for path in documents() if tree == "documents" else python_files(tree):
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for pattern, better in REPLACED_TERMS.items():
                if match := re.search(pattern, line, re.IGNORECASE):
                    problems.append(f"{path.relative_to(ROOT)}:{number}: {match[0]!r}, write: {better}")
    assert not problems, "\n" + "\n".join(problems)

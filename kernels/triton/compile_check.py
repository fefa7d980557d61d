"""Compile every kernel in every configuration that can be selected, for every architecture, without a GPU.

    python -m bwla_kernels.triton.compile_check [--arch 90] [--jobs 2] [--out FILE]

Fails on spills, stack, too much shared memory, or a missing tensor-core instruction. scripts/check_tritons.py runs it
with every supported Triton, not only the installed one. Triton caches what it compiles, so that a second run only reads
the results.
"""

import argparse
import functools
import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bwla_kernels.errors import BackendError
from bwla_kernels.triton.compile_table import (
    Key,
    Row,
    header,
    key_of,
    line,
    merge,
    read_rows,
    row_of,
    summary,
    write_rows,
)
from bwla_kernels.triton.compiling import ARCHITECTURES, CompileCase, compile_case

CASE_MODULES = (
    "bwla_kernels.triton.prepare_cases",
    "bwla_kernels.triton.matmul_cases",
    "bwla_kernels.triton.head_cases",
    "bwla_kernels.triton.experts_cases",
    "bwla_kernels.triton.grouped_cases",
    "bwla_kernels.triton.sign_steps_cases",
)
"""Modules with a `compile_cases(arch) -> list[CompileCase]`."""

SAVE_EVERY = 10
"""Rows after which the table is rewritten."""


@functools.cache
def all_cases(arch: int, modules: tuple[str, ...] = CASE_MODULES) -> tuple[CompileCase, ...]:
    """Return the cases of all modules for compute capability `arch` / 10."""
    return tuple(case for name in modules for case in importlib.import_module(name).compile_cases(arch))


def sample(cases: Sequence[int], names: Sequence[str], count: int) -> list[int]:
    """Select `count` cases of each kernel, spread over its configurations; `names` are the kernels of the cases.

    The command line samples one plane and several as if they were two kernels.
    """
    kernels: dict[str, list[int]] = {}
    for case, name in zip(cases, names, strict=True):
        kernels.setdefault(name, []).append(case)
    return [
        group[round((i + 0.5) * len(group) / count - 0.5)]
        for group in kernels.values()
        for i in range(min(count, len(group)))
    ]


def compile_one(modules: tuple[str, ...], arch: int, index: int) -> tuple[Row | None, list[str]]:
    """Compile case `index` of `all_cases`; return its row (None if it does not compile) and the gates that it fails."""
    try:
        compiled = compile_case(all_cases(arch, modules)[index], arch)
    except BackendError as error:
        return None, [str(error)]
    return row_of(compiled), compiled.problems()


def _compiled(
    selected: Sequence[tuple[int, int]], modules: tuple[str, ...], jobs: int
) -> Iterator[tuple[Row | None, list[str]]]:
    arches, indices = [arch for arch, _ in selected], [i for _, i in selected]
    if jobs == 1:
        yield from map(compile_one, [modules] * len(selected), arches, indices)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_one, [modules] * len(selected), arches, indices)


def check(
    selected: Sequence[tuple[int, int]],
    modules: tuple[str, ...],
    jobs: int = 1,
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> tuple[list[Row], list[str]]:
    """Compile cases and print their lines; return the rows and the gates that failed, each one sentence.

    Args:
        selected: architecture, and index in its `all_cases`, of each case.
        modules: modules of the cases.
        jobs: processes that compile.
        save: called with the rows so far at intervals, and with all of them at the end: a run may take an hour.
    """
    rows: list[Row] = []
    problems: list[str] = []
    print(header(), flush=True)
    for row, failed in _compiled(selected, modules, jobs):
        if row is not None:
            print(line(row), flush=True)
            rows.append(row)
            if len(rows) % SAVE_EVERY == 0:
                save(rows)
        problems += failed
    save(rows)
    return rows, problems


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bwla_kernels.triton.compile_check", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--config", help="only configurations whose text contains this")
    parser.add_argument("--sample", type=int, help="number of configurations of each kernel and architecture")
    parser.add_argument(
        "--slice", help="I/N: of the remaining cases, every N-th, starting with I (counted from 0)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--cases", help="another module with a compile_cases(arch) instead of this package's")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    parser.add_argument(
        "--merge", action="store_true", help="keep the rows of --out that are not compiled again"
    )
    parser.add_argument(
        "--missing", action="store_true", help="like --merge, and compile only what --out lacks"
    )
    return parser.parse_args(arguments)


def _select(options: argparse.Namespace, modules: tuple[str, ...]) -> list[tuple[int, int]]:
    selected: list[tuple[int, int]] = []
    for arch in options.arch or ARCHITECTURES:
        cases = all_cases(arch, modules)
        picked = [
            i
            for i, case in enumerate(cases)
            if (options.kernel or "") in case.name and (options.config or "") in case.config
        ]
        if options.sample:
            kinds = [f"{cases[i].name} {cases[i].planes > 1}" for i in picked]
            picked = sample(picked, kinds, options.sample)
        selected += [(arch, i) for i in picked]
    if options.slice:
        first, every = (int(number) for number in options.slice.split("/"))
        selected = selected[first::every]
    return selected


def _names(selected: Iterable[tuple[int, int]], modules: tuple[str, ...]) -> list[Key]:
    cases = [(arch, all_cases(arch, modules)[i]) for arch, i in selected]
    return [(arch, case.name, case.config) for arch, case in cases]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _arguments(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print(
            "compile_check: TRITON_INTERPRET is set: unset it, interpreted kernels are not compiled",
            file=sys.stderr,
        )
        return 2
    modules = (options.cases,) if options.cases else CASE_MODULES
    selected = _select(options, modules)
    if not selected:
        print("compile_check: no such kernel or configuration", file=sys.stderr)
        return 2
    everything = [(arch, i) for arch in ARCHITECTURES for i in range(len(all_cases(arch, modules)))]
    kept: list[Row] = []
    if options.out and options.out.exists() and (options.merge or options.missing):
        try:
            kept = merge(read_rows(options.out), [], _names(everything, modules))
        except BackendError as error:
            print(f"compile_check: {error}", file=sys.stderr)
            return 2
    if options.missing:
        present = {key_of(row) for row in kept if not row["spills"] + row["stack"]}
        selected = [
            one for one, name in zip(selected, _names(selected, modules), strict=True) if name not in present
        ]
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m bwla_kernels.triton.compile_check", *words])

    def save(rows: list[Row]) -> None:
        if options.out:
            write_rows(options.out, merge(kept, rows, _names(everything, modules)), command)

    rows, problems = check(selected, modules, options.jobs, save)
    for text in summary(rows):
        print(text)
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    print(f"{len(selected)} compiled, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

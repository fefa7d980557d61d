"""Compile every kernel in every configuration that can be selected, for every architecture, without a GPU.

    python -m bwla_kernels.triton.compile_check [--arch 90] [--out FILE]

Fails on spills, stack, too much shared memory, or a missing tensor-core instruction.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from bwla_kernels.errors import BackendError
from bwla_kernels.triton.compiling import ARCHITECTURES, CompileCase, Compiled, compile_case

CASE_MODULES = ("bwla_kernels.triton.prepare_cases", "bwla_kernels.triton.matmul_cases")
"""Modules with a `compile_cases(arch) -> list[CompileCase]`."""


def all_cases(arch: int, modules: Iterable[str] = CASE_MODULES) -> list[CompileCase]:
    """The cases of all modules for compute capability `arch` / 10."""
    return [case for name in modules for case in importlib.import_module(name).compile_cases(arch)]


def sample(cases: list[CompileCase], count: int) -> list[CompileCase]:
    """`count` cases of each kernel, spread over its configurations."""
    kernels: dict[str, list[CompileCase]] = {}
    for case in cases:
        kernels.setdefault(case.name, []).append(case)
    return [
        group[round((i + 0.5) * len(group) / count - 0.5)]
        for group in kernels.values()
        for i in range(min(count, len(group)))
    ]


def header() -> str:
    """The table's first line."""
    return (
        f"{'arch':>4}  {'kernel':<22} {'registers':>9} {'spills':>6} {'shared':>7} {'core':>8} "
        f"{'instr/weight':>12}  configuration"
    )


def line(found: Compiled) -> str:
    """One line of the table."""
    per_weight = "" if found.per_weight is None else f"{found.per_weight:.3f}"
    return (
        f"{found.arch:>4}  {found.case.name:<22} {found.registers:>9} {found.spills:>6} {found.shared_bytes:>7} "
        f"{found.tensor_core:>8} {per_weight:>12}  {found.case.config}"
    )


def row(found: Compiled) -> dict[str, str | int | float | None]:
    """One row of the JSON."""
    return {
        "kernel": found.case.name,
        "config": found.case.config,
        "arch": found.arch,
        "registers": found.registers,
        "spills": found.spills,
        "stack": found.stack,
        "shared_bytes": found.shared_bytes,
        "tensor_core": found.tensor_core,
        "instructions_per_weight": found.per_weight,
    }


def check(cases: Iterable[tuple[CompileCase, int]]) -> tuple[list[Compiled], list[str]]:
    """Compile each case, print its line; return what was found and the gates that failed, each one sentence."""
    found: list[Compiled] = []
    problems: list[str] = []
    print(header(), flush=True)
    for case, arch in cases:
        try:
            compiled = compile_case(case, arch)
        except BackendError as error:
            problems.append(str(error))
            continue
        print(line(compiled), flush=True)
        found.append(compiled)
        problems += compiled.problems()
    return found, problems


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bwla_kernels.triton.compile_check", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--config", help="only configurations whose text contains this")
    parser.add_argument("--sample", type=int, help="so many configurations of each kernel and architecture")
    parser.add_argument("--cases", help="another module with a compile_cases(arch) instead of this package's")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print(
            "compile_check: TRITON_INTERPRET is set: unset it, interpreted kernels have no code",
            file=sys.stderr,
        )
        return 2
    wanted: list[tuple[CompileCase, int]] = []
    for arch in options.arch or ARCHITECTURES:
        cases = [
            case
            for case in all_cases(arch, [options.cases] if options.cases else CASE_MODULES)
            if (options.kernel or "") in case.name and (options.config or "") in case.config
        ]
        wanted += [(case, arch) for case in (sample(cases, options.sample) if options.sample else cases)]
    if not wanted:
        print("compile_check: no such kernel or configuration", file=sys.stderr)
        return 2
    found, problems = check(wanted)
    if options.out:
        options.out.write_text(json.dumps({"rows": [row(one) for one in found]}, indent=1) + "\n")
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    print(f"{len(wanted)} compiled, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

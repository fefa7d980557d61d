"""Compile every kernel with every Triton that a supported vLLM release brings, without a GPU.

    python -m scripts.check_tritons                                            # everything: hours on one core
    python -m scripts.check_tritons --sample 1 --arch 90                       # a few minutes
    python -m scripts.check_tritons --triton 3.6.0 --triton 3.9.0 --jobs 2 --tables benchmarks/results

The releases stand in kernels/triton/versions.py. One that is not the installed one comes from the package index into
a folder of its own beside the environment (.env/triton-3.6.0), once; it needs no torch of its own. Every other option
goes to `python -m bwla_kernels.triton.compile_check`, which says what it checks. Ends with 0 where every kernel passed
with every Triton, else with 1; a Triton that fails keeps no other from being tried.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scripts.setup_env import SetupError, install_triton, tested_tritons


def table_name(triton: str) -> str:
    """The recorded table's file name for a Triton release: one for each minor release."""
    return f"triton_compile_{'.'.join(triton.split('.')[:2])}.json"


def installed_triton() -> str | None:
    """The Triton of this environment, None where there is none."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def environment(folder: Path | None, outer: Mapping[str, str]) -> dict[str, str]:
    """Variables of a process that compiles with the Triton in `folder`, or with the environment's own."""
    variables = {name: value for name, value in outer.items() if name != "TRITON_INTERPRET"}
    if folder is not None:
        variables["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [outer.get("PYTHONPATH")])])
    return variables


def check(triton: str, tables: Path | None, arguments: Sequence[str]) -> int:
    """Run the compile check with one Triton; returns its exit status.

    Raises:
        SetupError: that Triton could not be installed.
    """
    folder = None if triton == installed_triton() else install_triton(Path(sys.prefix), triton)
    command = [sys.executable, "-W", "ignore", "-m", "bwla_kernels.triton.compile_check", *arguments]
    if tables is not None:
        command += ["--out", str(tables / table_name(triton))]
    print(f"Triton {triton}", flush=True)
    return subprocess.run(command, env=environment(folder, os.environ), check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--triton", action="append", choices=tested_tritons(), help="only this one (may repeat); default: all"
    )
    parser.add_argument(
        "--tables", type=Path, help="folder for a table of each Triton: triton_compile_3.6.json"
    )
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(arguments)
    if options.out:
        parser.error("--out: expected --tables FOLDER, which holds a table for each Triton")
    failed = []
    for triton in options.triton or tested_tritons():
        try:
            if check(triton, options.tables, rest):
                failed.append(triton)
        except SetupError as error:
            print(f"check_tritons: {error}", file=sys.stderr)
            failed.append(triton)
    if failed:
        print(f"FAILED with Triton {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

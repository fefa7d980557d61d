"""Compile every kernel with every Triton that a supported vLLM release brings, without a GPU.

    python -m scripts.check_tritons                                            # everything: hours on one core
    python -m scripts.check_tritons --sample 1 --arch 90                       # a few minutes
    python -m scripts.check_tritons --triton 3.6.0 --triton 3.9.0 --jobs 2 --tables benchmarks/results

The releases are listed in kernels/triton/versions.py. Those that are not installed are installed once from the package
index into a separate folder of the environment (.env/triton-3.6.0). All other options are passed to
`python -m bwla_kernels.triton.compile_check`, which documents the checks. The exit status is 0 if every kernel passes
with every Triton, else 1; a failure does not stop the checks of other releases.
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
    """Return the file name of a Triton release's table; there is one for each minor release."""
    return f"triton_compile_{'.'.join(triton.split('.')[:2])}.json"


def installed_triton() -> str | None:
    """Return the version of Triton in this environment, or None."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def environment(folder: Path | None, outer: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables for compiling with the Triton in `folder`, or the installed one for None."""
    variables = {name: value for name, value in outer.items() if name != "TRITON_INTERPRET"}
    if folder is not None:
        variables["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [outer.get("PYTHONPATH")])])
    return variables


def check(triton: str, tables: Path | None, arguments: Sequence[str]) -> int:
    """Run the compile check with one Triton; return its exit status.

    Raises:
        SetupError: Triton could not be installed.
    """
    folder = None if triton == installed_triton() else install_triton(Path(sys.prefix), triton)
    command = [sys.executable, "-W", "ignore", "-m", "bwla_kernels.triton.compile_check", *arguments]
    if tables is not None:
        command += ["--out", str(tables / table_name(triton))]
    print(f"Triton {triton}", flush=True)
    return subprocess.run(command, env=environment(folder, os.environ), check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--triton",
        action="append",
        choices=tested_tritons(),
        help="release to check (repeatable; default: all)",
    )
    parser.add_argument("--tables", type=Path, help="folder for the tables, such as triton_compile_3.6.json")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(arguments)
    if options.out:
        parser.error("--out: expected --tables FOLDER, the folder for a table of each Triton")
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

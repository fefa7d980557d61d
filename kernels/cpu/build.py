"""Compile the CPU kernel; used by `pip install` (setup.py) and on the command line.

    python kernels/cpu/build.py

Standard library only, and no imports from this package: setup.py loads this file by path. No `-march`: the library
contains a variant for each instruction set, chosen at run time. No OpenMP at link time: the loader passes the runtime
that torch is linked to.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = "binary_linear.cpp"
LIBRARY = "_binary_linear.so"
FAILURE = "_binary_linear.txt"
"""File beside the library with the reason why it could not be built; the loader quotes it."""

FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    # a * b + c must not depend on the variant or tile that the compiler optimizes.
    "-ffp-contract=off",
    "-fno-math-errno",
)

LIBRARIES = ("-ldl",)
"""For dlsym, which is in a separate library in older C libraries."""


class BuildError(Exception):
    """The kernel could not be compiled; the message says why."""


def sources(folder: Path = FOLDER) -> list[Path]:
    """Return the source files of the library, in a fixed order."""
    return [folder / SOURCE, *sorted(folder.glob("*.h"))]


def build_id(folder: Path = FOLDER) -> str:
    """Return a short hash of the sources and flags; the library contains the one that it was built from."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sources(folder):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """Return the C++ compiler as the start of a command: $CXX, or the first of c++, g++, clang++ that is installed.

    Raises:
        BuildError: there is none.
    """
    requested = os.environ.get("CXX")
    for candidate in [requested] if requested else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise BuildError(
        f"no C++ compiler found (looked for {requested or 'c++, g++, clang++'}): "
        "install g++ or clang++, or set CXX"
    )


def compile_library(target: Path, folder: Path = FOLDER) -> None:
    """Compile the kernel to `target`; an existing library is replaced in one step.

    Raises:
        BuildError: no compiler, or it failed; quotes its first errors.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}.new")
    identity = f'-DBWLA_BUILD_ID="{build_id(folder)}"'
    command = [*find_compiler(), *FLAGS, identity, str(folder / SOURCE), "-o", str(fresh), *LIBRARIES]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            errors = "; ".join([line for line in lines if "error" in line][:3] or lines[-3:]) or "nothing"
            raise BuildError(
                f"`{shlex.join(command)}` failed with status {done.returncode} with the output: {errors}"
            )
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


if __name__ == "__main__":
    compile_library(FOLDER / LIBRARY)
    (FOLDER / FAILURE).unlink(missing_ok=True)
    print(f"built {FOLDER / LIBRARY}")

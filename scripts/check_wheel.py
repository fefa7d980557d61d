"""Check that the installed wheel contains the compiled CPU kernel, and that this system can load it.

    python scripts/check_wheel.py

cibuildwheel runs this in the container in which it built the wheel. A build without a working compiler succeeds, with
a wheel that lacks the kernel; such a wheel must not be published. Standard library only, and no import of the package:
the wheel is installed there without torch.
"""

import ctypes
import importlib.util
import os
import runpy
import sys
from pathlib import Path


class WheelError(Exception):
    """The wheel is incomplete; the message says what is missing."""


def kernel_folder() -> Path:
    """Return the folder of the installed package bwla_kernels.cpu.

    Raises:
        WheelError: it is not installed, or installed in editable mode.
    """
    spec = importlib.util.find_spec("bwla_kernels")
    if spec is None or spec.origin is None:
        raise WheelError(
            "expected an installed wheel of bwla, found no package bwla_kernels: install the wheel first"
        )
    folder = Path(spec.origin).parent
    if folder.name != "bwla_kernels":
        raise WheelError(
            f"expected an installed wheel, found an editable installation of {folder}: install the wheel"
        )
    return folder / "cpu"


def check(folder: Path) -> str:
    """Load the library in `folder`; return a description of it.

    Raises:
        WheelError: it is missing, cannot be loaded, or was built from other sources than those beside it.
    """
    builder = runpy.run_path(str(folder / "build.py"))
    library, failure = folder / builder["LIBRARY"], folder / builder["FAILURE"]
    if not library.exists():
        reason = failure.read_text(encoding="utf-8").strip() if failure.exists() else "it was not compiled"
        raise WheelError(f"expected {library} in the wheel, found none: {reason}")
    try:
        handle = ctypes.CDLL(str(library), mode=os.RTLD_NOW)
        build_id = handle.bwla_build_id
    except (OSError, AttributeError) as error:
        raise WheelError(f"expected a library that this system can load, found {library}: {error}") from error
    build_id.restype = ctypes.c_char_p
    found, expected = build_id().decode(), builder["build_id"](folder)
    if found != expected:
        raise WheelError(
            f"expected a library built from the sources beside it ({expected}), found {found}: {library}"
        )
    return f"{library}: loaded, best variant {handle.bwla_best_isa()}, built from {found}"


def main() -> int:
    """Run the command line; return 1 if the wheel is incomplete."""
    try:
        print(check(kernel_folder()))
    except WheelError as error:
        print(f"check_wheel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

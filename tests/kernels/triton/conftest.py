"""These tests run the kernels in Triton's interpreter where there is no GPU, and on the GPU where there is one.

A kernel is interpreted or compiled according to TRITON_INTERPRET at the moment its decorator runs, so the
variable is set here, before a test module of this folder is imported, and taken back after the collection:
the servers that other tests start must not inherit it.
"""

import os
import sys
from functools import partialmethod

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
VARIABLE = "TRITON_INTERPRET"


def _interpret_library() -> None:
    """Turn Triton's own helpers (`tl.sum`, `tl.zeros`, ...) into interpreted ones.

    Another test may have imported Triton before (transformers does); then they were decorated for the compiler,
    and the interpreter cannot call them.
    """
    import triton.language as tl
    from triton import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    library = [module for name, module in sys.modules.items() if name.startswith("triton.language")]
    for owner in (tl, *library):
        for name, value in list(vars(owner).items()):
            if isinstance(value, JITFunction):
                setattr(owner, name, InterpretedFunction(value.fn))
    for name, value in list(vars(tl.tensor).items()):
        if isinstance(value, JITFunction):
            setattr(tl.tensor, name, partialmethod(InterpretedFunction(value.fn)))


if INTERPRETED:
    os.environ[VARIABLE] = "1"
try:
    import triton  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]
    MISSING = True
else:
    MISSING = False
    if INTERPRETED:
        _interpret_library()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it where these tests could not run."""
    if MISSING:
        terminalreporter.write_line("SKIPPED tests/kernels/triton: Triton is not installed")


def pytest_collection_finish() -> None:
    """Let nothing outside this folder see the variable."""
    if INTERPRETED:
        os.environ.pop(VARIABLE, None)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv(VARIABLE, "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU (in the interpreter)."""
    return torch.device("cpu" if INTERPRETED else "cuda")

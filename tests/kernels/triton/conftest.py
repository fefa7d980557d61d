"""These tests run the kernels in Triton's interpreter where there is no GPU, and on the GPU where there is one."""

import pytest
import torch
from interpreted import INTERPRETED, MISSING, VARIABLE, pytest_collection_finish

__all__ = ["pytest_collection_finish"]

collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it where these tests could not run."""
    if MISSING:
        terminalreporter.write_line("SKIPPED tests/kernels/triton: Triton is not installed")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv(VARIABLE, "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU (in the interpreter)."""
    return torch.device("cpu" if INTERPRETED else "cuda")

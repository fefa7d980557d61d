"""The number of threads: the cores that may be used, the control group's quota, the size of the model."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bwla_converter.common import threads
from bwla_converter.common.threads import WEIGHTS_PER_THREAD, choose_threads, usable_cores, use_threads

LARGE = 2**30


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("250000 100000", 3), ("20000 100000", 1), ("6400000 100000", 8), ("damaged", 8)],
)
def test_a_control_group_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, cores: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(threads, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert usable_cores() == cores
    assert choose_threads(None, LARGE) == cores


def test_a_small_model_gets_fewer_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads, "CPU_QUOTA", tmp_path / "none")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert choose_threads(None, LARGE) == 8
    assert choose_threads(None, 3 * WEIGHTS_PER_THREAD) == 3
    assert choose_threads(None, 10) == 1
    assert choose_threads(5, 10) == 5


def test_threads_are_restored_after_an_error() -> None:
    before, inside = torch.get_num_threads(), 0
    with contextlib.suppress(KeyError), use_threads(before + 1):
        inside = torch.get_num_threads()
        raise KeyError
    assert inside == before + 1
    assert torch.get_num_threads() == before


def test_the_commands_let_waiting_threads_sleep_before_torch_is_imported() -> None:
    code = (
        "import os, sys; os.environ.pop('OMP_WAIT_POLICY', None); import bwla_converter.cli; "
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["passive", "False"]

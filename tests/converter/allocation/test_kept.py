"""Sensitivities that are kept in the cache."""

import os
from pathlib import Path

import pytest
import torch
from bwla_converter.allocation.kept import kept_or_measured, sensitivities_file
from bwla_converter.allocation.sensitivity import Sensitivity
from bwla_kernels.format import LayerSpec

SPECS = {"q_proj": LayerSpec(8, 64, 1, 8, 8)}
IDS = torch.arange(6).view(2, 3)
MEASURED = {"q_proj": Sensitivity(0.1, 1 / 3)}


def never() -> dict[str, Sensitivity]:
    pytest.fail("measured again")


def test_sensitivities_are_measured_once_and_read_exactly(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "numbers.json"
    assert kept_or_measured(file, lambda: MEASURED) == {"q_proj": (0.1, 1 / 3)}
    assert kept_or_measured(file, never) == {"q_proj": (0.1, 1 / 3)}


@pytest.mark.parametrize("contents", ["", "{", '{"q_proj": [1]}', '{"q_proj": ["a", "b"]}', "[1]"])
def test_a_damaged_file_is_measured_again(tmp_path: Path, contents: str) -> None:
    file = tmp_path / "numbers.json"
    file.write_text(contents)
    assert kept_or_measured(file, lambda: MEASURED) == {"q_proj": (0.1, 1 / 3)}
    assert kept_or_measured(file, never) == {"q_proj": (0.1, 1 / 3)}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert kept_or_measured(tmp_path / "cache" / "numbers.json", lambda: MEASURED) == {"q_proj": (0.1, 1 / 3)}


def test_the_file_depends_on_everything_that_is_measured(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")

    def file(ids: torch.Tensor = IDS, seed: int = 0, device: str = "cpu", n1: int = 8) -> Path:
        spec = LayerSpec(8, 64, 1, n1, 64 // n1)
        return sensitivities_file(tmp_path, {"q_proj": spec}, ids, seed, device)

    first = file()
    assert file() == first
    assert (
        len({first, file(IDS + 1), file(IDS.view(3, 2)), file(seed=1), file(device="cuda"), file(n1=16)}) == 6
    )
    os.utime(weights, ns=(1, 1))
    assert file() != first

"""Where measured sensitivities are kept."""

import os
from pathlib import Path

import torch
from bwla_converter.allocation.kept import sensitivities_file
from bwla_kernels.format import LayerSpec

IDS = torch.arange(6).view(2, 3)


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

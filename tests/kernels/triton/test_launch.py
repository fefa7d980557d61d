"""Dependent launches: where they are used, and the switch."""

import pytest
import torch
from bwla_kernels.triton import launch


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that can, as far as the switch is asked."""
    monkeypatch.setattr(launch, "_able", lambda index: True)
    return torch.device("cuda", 0)


def test_no_kernel_on_a_cpu_is_launched_so() -> None:
    assert not launch.is_dependent(torch.device("cpu"))


def test_a_gpu_that_can_overlaps_unless_it_is_switched_off(able: torch.device) -> None:
    assert launch.is_dependent(able)
    with launch.dependent_launch(False):
        assert not launch.is_dependent(able)
    assert launch.is_dependent(able)


@pytest.mark.parametrize("when", [launch.EARLY, launch.LATE])
def test_kernels_are_told_when_the_next_may_begin(when: int) -> None:
    with launch.dependent_launch(True, when):
        assert launch.trigger(True) == when
        assert launch.trigger(False) == launch.OFF
    assert launch.trigger(True) == launch.EARLY


def test_the_switch_is_put_back_after_an_error(able: torch.device) -> None:
    with pytest.raises(RuntimeError), launch.dependent_launch(False):
        raise RuntimeError
    assert launch.is_dependent(able)


@pytest.mark.parametrize(
    ("capability", "cuda", "wanted"),
    [((9, 0), "13.0", True), ((8, 9), "13.0", False), ((9, 0), "12.2", False), ((10, 0), "12.9", True)],
)
def test_capability_and_cuda_decide(
    capability: tuple[int, int], cuda: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs keep dependent launches from CUDA 12.3 on, GPUs know them from 9.0 on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    launch._able.cache_clear()
    assert launch._able(0) is wanted
    launch._able.cache_clear()

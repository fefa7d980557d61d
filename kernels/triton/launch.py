"""Programmatic dependent launch: let a kernel start while the one before it still runs.

On compute capability 9.0 and newer a dependent kernel begins once every program of the kernel before it has allowed it
(`gdc_launch_dependents`), reads its weights, and waits (`gdc_wait`) until that kernel has ended before it accesses
anything else. Every kernel of a layer takes part, so that the launches of a layer overlap. CUDA graphs keep
such launches from CUDA 12.3 on.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch

MIN_CAPABILITY = (9, 0)
MIN_CUDA = (12, 3)
"""First CUDA version whose graphs capture dependent launches."""

OFF, EARLY, LATE = 0, 1, 2
"""When a kernel allows the next one to begin: not before it ends (and then it does not wait either), at its own start,
or before its last step."""

_trigger = EARLY
"""Measured on an H200 with Qwen3-32B's and 8B's linears (benchmarks/results/gpu_day_h200.json): EARLY takes 7 and 18 %
off a decode step, LATE 11 and 15 %. Prefetching weights into the second-level cache meanwhile took longer than not."""


def trigger(dependent: bool) -> int:
    """Return the kernels' constexpr PDL: OFF for a launch that does not overlap."""
    return _trigger if dependent else OFF


@functools.cache
def _able(index: int | None) -> bool:
    """Return whether a GPU and its CUDA version support dependent launches."""
    if index is None or torch.version.cuda is None:
        return False
    cuda = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return torch.cuda.get_device_capability(index) >= MIN_CAPABILITY and cuda >= MIN_CUDA


def is_dependent(device: torch.device) -> bool:
    """Return whether a layer's kernels on `device` are launched dependently."""
    return _trigger != OFF and device.type == "cuda" and _able(device.index)


def set_dependent_launch(when: int) -> None:
    """Set OFF, EARLY or LATE for layers that run or are captured from now on, on GPUs that support it."""
    global _trigger
    _trigger = when


@contextlib.contextmanager
def dependent_launch(enabled: bool, when: int = EARLY) -> Iterator[None]:
    """Enable or disable dependent launches within a context, for comparisons."""
    before = _trigger
    set_dependent_launch(when if enabled else OFF)
    try:
        yield
    finally:
        set_dependent_launch(before)

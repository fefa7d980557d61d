"""How many threads a conversion uses on the CPU."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

WEIGHTS_PER_THREAD = 2**16
"""Weights of the widest linear for each thread; with fewer, threads wait for each other more than they compute."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Return the cores that this process may use: torch's number of threads, or its control group's quota if less.

    torch honours OMP_NUM_THREADS and the process's affinity. It does not know the quota, as set by `docker --cpus`.
    """
    cores = torch.get_num_threads()
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores  # no control group, or one without a quota


def choose_threads(requested: int | None, widest: int) -> int:
    """Return the number of threads: as requested, or all usable cores if the model is large enough for them.

    Args:
        requested: number of threads; None to choose.
        widest: weights of the widest linear.
    """
    return requested or max(1, min(usable_cores(), widest // WEIGHTS_PER_THREAD))


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch and our kernels use `count` threads inside the `with` statement."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""The properties of a GPU that the kernels depend on, and whether the Triton kernels run on it."""

import functools
import importlib.util
from typing import NamedTuple

import torch

MIN_CAPABILITY = (8, 0)
"""Oldest compute capability that the kernels are written for: the first with int8 tensor cores that they use."""


class GpuProperties(NamedTuple):
    """Compute capability and number of multiprocessors."""

    capability: tuple[int, int]
    multiprocessors: int


INTERPRETER = GpuProperties((9, 0), 132)
"""What a tensor on the CPU is treated as: Triton's interpreter has no GPU to ask."""


@functools.cache
def gpu_properties(device: torch.device) -> GpuProperties:
    """Return the properties of `device`, or `INTERPRETER` for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return GpuProperties((properties.major, properties.minor), properties.multi_processor_count)


def can_run(device: torch.device) -> tuple[bool, str]:
    """Return whether the Triton kernels run on `device`, and the reason."""
    if device.type != "cuda":
        return False, f"the Triton kernels run on an NVIDIA GPU, not on {device}"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed: pip install triton"
    if torch.version.hip is not None:
        return False, "the Triton kernels are written for NVIDIA GPUs, found an AMD GPU"
    capability = gpu_properties(device).capability
    found, required = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
    if capability < MIN_CAPABILITY:
        return False, f"the Triton kernels need compute capability {required} or newer, found {found}"
    return True, f"Triton on compute capability {found}"

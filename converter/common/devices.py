"""Where a conversion computes."""

import torch
from bwla_kernels.errors import BWLAError


def is_out_of_memory(error: Exception) -> bool:
    """Whether a failed allocation, in Python or in torch, on the CPU or a GPU, is behind an error."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "DefaultCPUAllocator: can't allocate memory" in str(
        error
    )  # torch has no class for this one


def choose_device(name: str) -> torch.device:
    """The device called `cpu`, `cuda`, `cuda:1` or `auto` (a GPU where there is one).

    Raises:
        BWLAError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BWLAError(f"--device: expected cpu, cuda or auto, found {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise BWLAError(f"--device: expected cpu, cuda or auto, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        build = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise BWLAError(
            f"--device {name}: expected such a GPU, found {torch.cuda.device_count()} of them{build}: "
            "use --device cpu, or install a torch for your GPU"
        )
    return device

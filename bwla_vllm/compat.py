"""Differences between the supported vLLM releases, and which vLLM and Triton releases were tested.

scripts/check_vllm_hooks.py checks the sources of each release for everything that the plugin uses;
scripts/try_vllm_versions.py serves the example with the releases that run on this machine.
"""

from importlib.util import find_spec

from bwla_kernels.triton.versions import TESTED as TESTED_TRITONS
from packaging.version import InvalidVersion, Version
from torch import nn

OLDEST, NEWEST = "0.26", "0.33"
"""First and last tested minor release, both included."""


def outside_tested_range(release: str) -> str | None:
    """Return a warning if vLLM `release` is outside the tested range, else None.

    A release without a version number (a build from a checkout may be called "dev") counts as untested.
    """
    try:
        minor = Version(release).release[:2]
        if Version(OLDEST).release <= minor <= Version(NEWEST).release:
            return None
    except InvalidVersion:
        pass
    return (
        f"vLLM {release} is outside the releases that this bwla was tested with ({OLDEST} to {NEWEST}): "
        "if it fails, install one of those, or another bwla"
    )


def untested_triton(release: str) -> str | None:
    """Return a warning if Triton `release` is older or newer than all tested ones, else None.

    A release without a version number counts as untested.
    """
    oldest, newest = TESTED_TRITONS[0], TESTED_TRITONS[-1]
    try:
        if Version(oldest).release <= Version(release).release <= Version(newest).release:
            return None
    except InvalidVersion:
        pass
    return (
        f"Triton {release} is outside the releases that the kernels of this bwla were tested with "
        f"({oldest} to {newest}): if it fails, install one of those, or another bwla"
    )


def routing_problem() -> str | None:
    """Describe why this vLLM cannot route tokens to one-bit experts on its device; return None if it can.

    Before 0.30, vLLM chooses experts on the CPU inside its own kernels.
    """
    from vllm.platforms import current_platform

    router = "vllm.model_executor.layers.fused_moe.router.cpu_router"
    if not current_platform.is_cpu() or find_spec(router) is not None:
        return None
    return "one-bit experts on the CPU need vLLM 0.30 or newer: install it, or serve the model on a GPU"


def is_moe_layer(layer: nn.Module) -> bool:
    """Return whether `layer` is a mixture of experts: `FusedMoE` in older releases, `RoutedExperts` in newer ones.

    In newer releases the old name is a factory function rather than a class.
    """
    import vllm.model_executor.layers.fused_moe as fused_moe

    candidates = (getattr(fused_moe, name, None) for name in ("RoutedExperts", "FusedMoE"))
    return isinstance(layer, tuple(kind for kind in candidates if isinstance(kind, type)))

"""Differences between the supported vLLM releases, and which vLLM and Triton releases were tested.

scripts/check_vllm_hooks.py checks the sources of each release for everything that the plugin uses;
scripts/try_vllm_versions.py serves the example with the releases that run on this machine.
"""

from bwla_kernels.triton.versions import TESTED as TESTED_TRITONS
from packaging.version import InvalidVersion, Version
from torch import nn

OLDEST, NEWEST = "0.26", "0.33"
"""First and last tested minor release, both included."""

OLDEST_EXPERTS = "0.32"
"""First release that loads all tensors of one-bit experts."""

SKIPPING_CPU_LORA = "0.33"
"""First release whose LoRA operations for CPUs skip rows without an adapter, see `compat.cpu_lora`."""

CPU_LORA_OPERATIONS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
"""vLLM's LoRA operations for CPUs that apply an adapter to each row of their input."""


def is_at_least(release: str, oldest: str) -> bool:
    """Return whether vLLM `release` is `oldest` or newer; a release without a version number is taken for a new one."""
    try:
        return Version(release).release >= Version(oldest).release
    except InvalidVersion:
        return True


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


def experts_problem(release: str) -> str | None:
    """Return why vLLM `release` cannot serve one-bit experts; None if it can.

    Releases before 0.32 take every tensor of three dimensions, as rotations have, for one that stacks all experts.
    """
    if is_at_least(release, OLDEST_EXPERTS):
        return None
    return (
        f"one-bit experts need vLLM {OLDEST_EXPERTS} or newer, found {release}: install it, or convert the model again "
        "with --ignore experts"
    )


def is_moe_layer(layer: nn.Module) -> bool:
    """Return whether `layer` is a mixture of experts: `FusedMoE` in older releases, `RoutedExperts` in newer ones.

    In newer releases the old name is a factory function rather than a class.
    """
    import vllm.model_executor.layers.fused_moe as fused_moe

    candidates = (getattr(fused_moe, name, None) for name in ("RoutedExperts", "FusedMoE"))
    return isinstance(layer, tuple(kind for kind in candidates if isinstance(kind, type)))

"""What differs between the vLLM releases that the plugin supports; which those are, and which Triton releases.

scripts/check_vllm_hooks.py looks for everything that the plugin uses in each release's sources;
scripts/try_vllm_versions.py serves the example with those that run on this machine.
"""

from bwla_kernels.triton.versions import TESTED as TESTED_TRITONS
from packaging.version import InvalidVersion, Version
from torch import nn

OLDEST, NEWEST = "0.26", "0.33"
"""First and last minor release that were checked, both included."""


def outside_tested_range(release: str) -> str | None:
    """A sentence for the log where vLLM `release` is none of those that were checked; None where it is.

    A release that names no version (a build from a checkout may say "dev") counts as unchecked.
    """
    try:
        minor = Version(release).release[:2]
        if Version(OLDEST).release <= minor <= Version(NEWEST).release:
            return None
    except InvalidVersion:
        pass
    return (
        f"vLLM {release} is outside the releases that this bwla was checked with ({OLDEST} to {NEWEST}): "
        "if it fails, install one of those, or another bwla"
    )


def untested_triton(release: str) -> str | None:
    """A sentence for the log where Triton `release` is older or newer than all that were checked; None between them.

    A release that names no version counts as unchecked.
    """
    oldest, newest = TESTED_TRITONS[0], TESTED_TRITONS[-1]
    try:
        if Version(oldest).release <= Version(release).release <= Version(newest).release:
            return None
    except InvalidVersion:
        pass
    return (
        f"Triton {release} is outside the releases that the kernels of this bwla were compiled and checked with "
        f"({oldest} to {newest}): if it fails, install one of those, or another bwla"
    )


def is_moe_layer(layer: nn.Module) -> bool:
    """Whether `layer` holds a mixture's experts: `FusedMoE` in older releases, `RoutedExperts` in newer ones.

    The old name lives on in newer releases as a factory function, which is no class to compare with.
    """
    import vllm.model_executor.layers.fused_moe as fused_moe

    named = (getattr(fused_moe, name, None) for name in ("RoutedExperts", "FusedMoE"))
    return isinstance(layer, tuple(kind for kind in named if isinstance(kind, type)))

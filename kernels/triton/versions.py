"""The Triton releases with which these kernels are tested, and the torch and vLLM releases that depend on them.

Standard library only: scripts read this file before anything is installed.
"""

from typing import NamedTuple


class TritonRelease(NamedTuple):
    """A Triton release and the packages that depend on it.

    Attributes:
        version: as on the package index.
        torch: the release of torch that pins it.
        vllm: the releases of vLLM that pin that torch.
    """

    version: str
    torch: str
    vllm: str


RELEASES = (
    TritonRelease("3.6.0", "2.11", "0.26"),
    TritonRelease("3.7.1", "2.13", "0.27 to 0.32"),
    TritonRelease("3.8.0", "2.14", "0.33"),
    TritonRelease("3.9.0", "none yet", "none yet"),
)
"""Oldest first: those of the supported vLLM releases, then the newest on the package index.

`make setup` installs the last one: a CPU build of torch pins no Triton, and vLLM accepts any.
"""

TESTED = tuple(release.version for release in RELEASES)
"""The versions with which scripts/check_tritons.py compiles every kernel."""

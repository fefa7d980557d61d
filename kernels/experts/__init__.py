"""The one-bit experts of a mixture-of-experts layer: sizes, reference implementation, choice of a backend."""

from bwla_kernels.experts.spec import ACTIVATIONS, ExpertsSpec

__all__ = ["ACTIVATIONS", "ExpertsSpec"]

"""The CPU backend: the compiled kernel behind the interface of `ops.LinearBackend`, as a torch.library op.

The op is declared in this module and implemented in the library (torch_ops.h), which registers it when it is loaded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from bwla_kernels import gradients
from bwla_kernels.cpu import linear as kernel
from bwla_kernels.cpu.gradient import input_gradient
from bwla_kernels.format import LayerSpec
from torch import Tensor

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LAYER = (
    "Tensor packed, Tensor? bias, int out_features, int rotation_groups, int n1, int n2, "
    "int rank, int bits, float clip, int planes, bool grouped"
)
_LIBRARY.define(f"linear_cpu(Tensor x, {_LAYER}) -> Tensor")


def _linear_fake(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _input_gradient(gradient: Tensor, packed: Tensor, bias: Tensor | None, *sizes: Any) -> Tensor:
    out_features, groups, n1, n2, rank, bits, clip, planes, grouped = sizes
    spec = LayerSpec(
        out_features, groups * n1 * n2, groups, n1, n2, rank, bits, clip, planes=planes, grouped=grouped
    )
    return input_gradient(gradient, packed, spec)


def _in_features(packed: Tensor, bias: Tensor | None, out_features: int, *sizes: int) -> int:
    groups, n1, n2 = sizes[:3]
    return groups * n1 * n2


torch.library.register_fake("bwla::linear_cpu", _linear_fake, lib=_LIBRARY)
gradients.register_input_gradient(_LIBRARY, "linear_cpu", _LAYER, _input_gradient, _in_features)
_LINEAR = torch.ops.bwla.linear_cpu.default
"""The overload, because looking it up takes longer than the call."""


class CpuBackend:
    """Compute a layer with the compiled table-lookup kernel on the CPU."""

    name = "cpu"

    def can_implement(self, spec: LayerSpec, device: torch.device) -> tuple[bool, str]:
        """Return whether the kernel was built and covers the layer, and the reason."""
        if device.type != "cpu":
            return False, f"the compiled kernel runs on the CPU, not on {device}"
        return kernel.can_implement(spec)

    def prepare(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Repack everything into one tensor, `packed`; a bias passes through."""
        bias = {"bias": tensors["bias"]} if "bias" in tensors else {}
        return {"packed": kernel.pack(tensors, spec), **bias}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Compute x [..., K] -> [..., N] in the dtype of x."""
        y: Tensor = _LINEAR(
            x,
            tensors["packed"],
            tensors.get("bias"),
            spec.out_features,
            spec.rotation_groups,
            spec.n1,
            spec.n2,
            spec.rank,
            spec.bits,
            spec.clip,
            spec.planes,
            spec.grouped,
        )
        return y

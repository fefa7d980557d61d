"""The torch backend of experts: the reference implementation behind the interface of `ops.ExpertsBackend`."""

from collections.abc import Mapping

import torch
from bwla_kernels.experts.reference import binary_experts
from bwla_kernels.experts.spec import ExpertsSpec, expect_stacked
from torch import Tensor


class TorchExperts:
    """Compute experts with the reference implementation: any device and sizes, one expert after another, slowly."""

    name = "torch"

    def can_implement(self, spec: ExpertsSpec, device: torch.device) -> tuple[bool, str]:
        """Return True and the reason: plain torch runs anywhere."""
        return True, "plain torch runs anywhere"

    def prepare(
        self, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor], spec: ExpertsSpec
    ) -> dict[str, Tensor]:
        """Keep the stored tensors, under names that say whose they are."""
        expect_stacked("gate_up", gate_up, spec.experts, spec.gate_up)
        expect_stacked("down", down, spec.experts, spec.down)
        named = {"gate_up": gate_up, "down": down}
        return {f"{which}_{name}": tensor for which, side in named.items() for name, tensor in side.items()}

    def apply(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        tensors: Mapping[str, Tensor],
        spec: ExpertsSpec,
    ) -> Tensor:
        """Compute x [M, H] -> [M, H] in the dtype of x."""
        gate_up, down = (
            {name.removeprefix(which): tensor for name, tensor in tensors.items() if name.startswith(which)}
            for which in ("gate_up_", "down_")
        )
        return binary_experts(x, topk_weights, topk_ids, gate_up, down, spec)

"""The GPU backend of experts: `experts.run_experts` behind the interface of `ops.ExpertsBackend`, as an op of torch.

Triton is imported when a layer first needs it, so that a machine without a GPU need not have it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from bwla_kernels import gradients
from bwla_kernels.experts.spec import ACTIVATIONS, ExpertsSpec, expect_stacked
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import UNQUANTIZED_BITS
from bwla_kernels.triton.gpu import can_run
from torch import Tensor

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")

_REQUIRED = ("weight_chunks", "weight_scale", "left_split", "right_split", "column_scale")
_OPTIONAL = ("low_rank_a", "low_rank_b", "bias")
_SIZES = {
    "rotation_groups": "int",
    "n1": "int",
    "n2": "int",
    "rank": "int",
    "bits": "int",
    "clip": "float",
    "planes": "int",
}
_SIDES = ("gate_up", "down")


def _schema() -> str:
    tensors = [
        *(f"Tensor {side}_{name}" for side in _SIDES for name in _REQUIRED),
        *(f"Tensor? {side}_{name}" for side in _SIDES for name in _OPTIONAL),
    ]
    sizes = [f"{kind} {side}_{name}" for side in _SIDES for name, kind in _SIZES.items()]
    routing = ["Tensor x", "Tensor topk_weights", "Tensor topk_ids"]
    activation = ["int activation", "float limit", "float alpha"]
    return ", ".join([*routing, *tensors, "int experts", *activation, *sizes])


_LIBRARY.define(f"experts_triton({_schema()}) -> Tensor")


def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *arguments: Any) -> Tensor:
    from bwla_kernels.triton.experts import run_experts

    required, optional = 2 * len(_REQUIRED), 2 * len(_OPTIONAL)
    names = [*(name for _ in _SIDES for name in _REQUIRED), *(name for _ in _SIDES for name in _OPTIONAL)]
    sides: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for i, (name, tensor) in enumerate(zip(names, arguments, strict=False)):
        of_down = i >= len(_REQUIRED) if i < required else i >= required + len(_OPTIONAL)
        if tensor is not None:
            sides[of_down][name] = tensor
    experts, activation, limit, alpha, *sizes = arguments[required + optional :]
    gate_up, down = sizes[: len(_SIZES)], sizes[len(_SIZES) :]
    hidden, inner = (side[0] * side[1] * side[2] for side in (gate_up, down))
    spec = ExpertsSpec(
        experts,
        _layer_spec(2 * inner, gate_up, "bias" in sides[0]),
        _layer_spec(hidden, down, "bias" in sides[1]),
        ACTIVATIONS[activation],
        limit,
        alpha,
    )
    return run_experts(x, topk_weights, topk_ids, *sides, spec)


def _layer_spec(rows: int, sizes: list[Any], bias: bool) -> LayerSpec:
    named = dict(zip(_SIZES, sizes, strict=True))
    return LayerSpec(rows, named["rotation_groups"] * named["n1"] * named["n2"], bias=bias, **named)


def _experts_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY.impl("experts_triton", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("bwla::experts_triton", _experts_fake, lib=_LIBRARY)
gradients.refuse_gradient(_LIBRARY, "experts_triton", "experts are for inference only")


class TritonExperts:
    """Compute experts on NVIDIA GPUs of compute capability 8.0 or newer."""

    name = "triton"

    def can_implement(self, spec: ExpertsSpec, device: torch.device) -> tuple[bool, str]:
        """Return whether the kernels run on `device` and cover the experts, and the reason."""
        able, reason = can_run(device)
        if not able:
            return False, reason
        if UNQUANTIZED_BITS in (spec.gate_up.bits, spec.down.bits):
            return False, "the Triton kernels need quantized activations (2 to 8 bits)"
        from bwla_kernels.triton.prepare_input import can_prepare

        for side in (spec.gate_up, spec.down):
            covered, refusal = can_prepare(side)
            if not covered:
                return False, refusal
        return True, reason

    def prepare(
        self, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor], spec: ExpertsSpec
    ) -> dict[str, Tensor]:
        """Repack both projections, on the same device; kernels are compiled at their first call."""
        from bwla_kernels.triton.experts import repack_experts

        prepared: dict[str, Tensor] = {}
        for side, tensors, sizes in zip(_SIDES, (gate_up, down), (spec.gate_up, spec.down), strict=True):
            expect_stacked(side, tensors, spec.experts, sizes)
            repacked = repack_experts(tensors, spec.experts, sizes)
            prepared |= {f"{side}_{name}": tensor for name, tensor in repacked.items()}
        return prepared

    def apply(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        tensors: Mapping[str, Tensor],
        spec: ExpertsSpec,
    ) -> Tensor:
        """Compute x [M, H] -> [M, H] in the dtype of x."""
        named = [f"{side}_{name}" for names in (_REQUIRED, _OPTIONAL) for side in _SIDES for name in names]
        sizes = [getattr(side, name) for side in (spec.gate_up, spec.down) for name in _SIZES]
        y: Tensor = torch.ops.bwla.experts_triton.default(
            x,
            topk_weights,
            topk_ids,
            *(tensors.get(name) for name in named),
            spec.experts,
            ACTIVATIONS.index(spec.activation),
            spec.limit,
            spec.alpha,
            *sizes,
        )
        return y

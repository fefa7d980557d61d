"""The GPU backend: two Triton kernels behind the interface of `ops.LinearBackend`, as torch.library ops.

Triton is imported when a layer first needs it, so that a machine without a GPU need not have it.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bwla_kernels import gradients
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import UNQUANTIZED_BITS
from bwla_kernels.triton.gpu import can_run, gpu_properties
from bwla_kernels.triton.grouped_backend import apply_grouped, prepare_grouped
from torch import Tensor

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LAYER = (
    "Tensor weight_chunks, Tensor weight_scale, Tensor split_counters, Tensor left_split, "
    "Tensor right_split, Tensor column_scale, Tensor? low_rank_a, Tensor? low_rank_b, Tensor? bias, "
    "int out_features, int rotation_groups, int n1, int n2, int rank, int bits, float clip, int planes"
)
# The fused ops also compute what precedes the layer, where its input is loaded; bwla_vllm.fusion inserts them.
_LIBRARY.define(f"linear_triton(Tensor x, {_LAYER}) -> Tensor")
_LIBRARY.define(f"rms_norm_linear_triton(Tensor x, {_LAYER}, Tensor norm_weight, float eps) -> Tensor")
_LIBRARY.define(
    f"add_rms_norm_linear_triton(Tensor x, {_LAYER}, Tensor norm_weight, float eps, Tensor residual) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(f"silu_mul_linear_triton(Tensor x, {_LAYER}) -> Tensor")

_TENSORS = (
    "weight_chunks",
    "weight_scale",
    "split_counters",
    "left_split",
    "right_split",
    "column_scale",
    "low_rank_a",
    "low_rank_b",
    "bias",
)
"""The ops' tensor arguments between x and the layer's sizes; the last three may be None."""


@functools.lru_cache(maxsize=4096)
def _spec(
    out_features: int,
    rotation_groups: int,
    n1: int,
    n2: int,
    rank: int,
    bits: int,
    clip: float,
    planes: int,
) -> LayerSpec:
    columns = rotation_groups * n1 * n2
    return LayerSpec(
        out_features, columns, rotation_groups, n1, n2, rank=rank, bits=bits, clip=clip, planes=planes
    )


def _unpack(layer: Sequence[Any]) -> tuple[dict[str, Tensor], LayerSpec]:
    """Turn an op's arguments after x into the layer's tensors by name and its sizes."""
    tensors = {name: tensor for name, tensor in zip(_TENSORS, layer, strict=False) if tensor is not None}
    return tensors, _spec(*layer[len(_TENSORS) :])


def _linear(x: Tensor, *layer: Any) -> Tensor:
    from bwla_kernels.triton.layer import run_layer

    return run_layer(x, *_unpack(layer))[0]


def _rms_norm_linear(x: Tensor, *arguments: Any) -> Tensor:
    from bwla_kernels.triton.layer import run_layer
    from bwla_kernels.triton.prepare_input import FusedInput

    *layer, norm_weight, eps = arguments
    _warm_up_fused("norm", x, layer, norm_weight)
    return run_layer(x, *_unpack(layer), FusedInput(norm_weight, eps))[0]


def _add_rms_norm_linear(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from bwla_kernels.triton.layer import run_layer
    from bwla_kernels.triton.prepare_input import FusedInput

    *layer, norm_weight, eps, residual = arguments
    _warm_up_fused("add+norm", x, layer, norm_weight)
    y, total = run_layer(x, *_unpack(layer), FusedInput(norm_weight, eps, residual))
    assert total is not None
    return y, total


def _silu_mul_linear(x: Tensor, *layer: Any) -> Tensor:
    from bwla_kernels.triton.layer import run_layer
    from bwla_kernels.triton.prepare_input import FusedInput

    _warm_up_fused("silu*mul", x, layer)
    return run_layer(x, *_unpack(layer), FusedInput(silu_mul=True))[0]


def _warm_up_fused(fused: str, x: Tensor, layer: Sequence[Any], norm_weight: Tensor | None = None) -> None:
    """Check and compile the kernels for other numbers of tokens, once for each process and kind of layer.

    `prepare` cannot know what a compiler fuses. A server runs its model once before it captures CUDA graphs and
    before it takes requests, which is when this happens.
    """
    if x.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    from bwla_kernels.triton.warm_up import warm_up

    tensors, spec = _unpack(layer)
    warm_up(spec, tensors, x.dtype, *gpu_properties(x.device), fused=fused, norm_weight=norm_weight)


def _linear_fake(x: Tensor, weight_chunks: Tensor, weight_scale: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_scale.shape[0])


def _add_fake(x: Tensor, weight_chunks: Tensor, weight_scale: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _linear_fake(x, weight_chunks, weight_scale), x.new_empty(x.shape)


for _name, _run, _fake in (
    ("linear_triton", _linear, _linear_fake),
    ("rms_norm_linear_triton", _rms_norm_linear, _linear_fake),
    ("add_rms_norm_linear_triton", _add_rms_norm_linear, _add_fake),
    ("silu_mul_linear_triton", _silu_mul_linear, _linear_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bwla::{_name}", _fake, lib=_LIBRARY)


def _input_gradient(gradient: Tensor, *layer: Any) -> Tensor:
    from bwla_kernels.triton.layout import layer_layout, unpack_weights
    from bwla_kernels.triton.prepare_input import join_rotations

    tensors, spec = _unpack(layer)
    packed, layout = tensors["weight_chunks"], layer_layout(spec)
    rows = torch.arange(spec.out_features, device=packed.device)
    scales = tensors["weight_scale"].view(-1, spec.planes, 1)
    parts = gradients.row_slabs(spec.out_features, spec.planes * spec.in_features)
    slabs = ((unpack_weights(packed, layout, rows[part]) * scales[part]).sum(1) for part in parts)
    rotations = join_rotations(tensors["left_split"], tensors["right_split"], spec)
    low_rank_a, low_rank_b = tensors.get("low_rank_a"), tensors.get("low_rank_b")
    if low_rank_b is not None:
        low_rank_b = low_rank_b[: spec.out_features, : spec.rank]
    return gradients.linear_input_gradient(
        gradient, slabs, *rotations, tensors["column_scale"], low_rank_a, low_rank_b
    )


gradients.register_input_gradient(
    _LIBRARY, "linear_triton", _LAYER, _input_gradient, lambda *layer: _unpack(layer)[1].in_features
)
for _name in ("rms_norm_linear_triton", "add_rms_norm_linear_triton", "silu_mul_linear_triton"):
    gradients.refuse_gradient(
        _LIBRARY, _name, "it is for inference only: compute the layer and what precedes it apart"
    )


def repack(tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """Repack a layer's stored tensors for the kernels, on the same device; compile nothing."""
    from bwla_kernels.triton.binary_matmul import prepare_weights
    from bwla_kernels.triton.prepare_input import split_rotations

    left, right = split_rotations(tensors["rotation_left"], tensors["rotation_right"])
    prepared = prepare_weights(tensors, spec)
    prepared |= {
        "left_split": left,
        "right_split": right,
        "column_scale": tensors["column_scale"].float().contiguous(),
    }
    if spec.rank:
        prepared["low_rank_a"] = tensors["low_rank_a"].contiguous()
    return prepared


class TritonBackend:
    """Compute W1A2 to W1A8 layers on NVIDIA GPUs of compute capability 8.0 or newer."""

    name = "triton"

    def can_implement(self, spec: LayerSpec, device: torch.device) -> tuple[bool, str]:
        """Return whether the kernels run on `device` and cover the layer, and the reason."""
        able, reason = can_run(device)
        if not able:
            return False, reason
        if spec.bits == UNQUANTIZED_BITS:
            return False, "the Triton kernels need quantized activations (2 to 8 bits)"
        if spec.grouped:
            from bwla_kernels.triton.grouped import can_quantize

            covered, refusal = can_quantize(spec)
        else:
            from bwla_kernels.triton.prepare_input import can_prepare

            covered, refusal = can_prepare(spec)
        return (True, reason) if covered else (False, refusal)

    def prepare(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Repack the weights, split the rotations, and compile every kernel that a request may need.

        Raises:
            BackendError: a kernel computes wrong numbers with this GPU and Triton.
        """
        if spec.grouped:
            return prepare_grouped(tensors, spec)
        prepared = repack(tensors, spec)
        device = prepared["weight_scale"].device
        if device.type == "cuda":
            from bwla_kernels.triton.warm_up import warm_up

            warm_up(spec, prepared, torch.get_default_dtype(), *gpu_properties(device))
        return prepared

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Compute x [..., K] -> [..., N] in the dtype of x."""
        if spec.grouped:
            return apply_grouped(x, tensors, spec)
        y: Tensor = torch.ops.bwla.linear_triton.default(
            x,
            tensors["weight_chunks"],
            tensors["weight_scale"],
            tensors["split_counters"],
            tensors["left_split"],
            tensors["right_split"],
            tensors["column_scale"],
            tensors.get("low_rank_a"),
            tensors.get("low_rank_b"),
            tensors.get("bias"),
            spec.out_features,
            spec.rotation_groups,
            spec.n1,
            spec.n2,
            spec.rank,
            spec.bits,
            spec.clip,
            spec.planes,
        )
        return y

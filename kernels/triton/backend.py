"""The GPU backend: two Triton kernels behind the interface of `ops.LinearBackend`, as torch.library ops.

Triton is imported when a layer first needs it: a machine without a GPU need not have it.
"""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import UNQUANTIZED_BITS
from bwla_kernels.triton.launch import is_dependent
from torch import Tensor

MIN_CAPABILITY = (8, 0)
_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LAYER = (
    "Tensor x, Tensor weight_chunks, Tensor weight_scale, Tensor split_counters, Tensor left_split, "
    "Tensor right_split, Tensor column_scale, Tensor? low_rank_a, Tensor? low_rank_b, Tensor? bias, "
    "int out_features, int blocks, int n1, int n2, int rank, int bits, float clip"
)
# What comes before a layer, computed where its input is loaded; a compiler pass puts these in (bwla_vllm.fusion).
_LIBRARY.define(f"linear_triton({_LAYER}) -> Tensor")
_LIBRARY.define(f"rms_norm_linear_triton({_LAYER}, Tensor norm_weight, float eps) -> Tensor")
_LIBRARY.define(
    f"add_rms_norm_linear_triton({_LAYER}, Tensor norm_weight, float eps, Tensor residual) -> (Tensor, Tensor)"
)
_LIBRARY.define(f"silu_mul_linear_triton({_LAYER}) -> Tensor")


@functools.lru_cache(maxsize=4096)
def _spec(out_features: int, blocks: int, n1: int, n2: int, rank: int, bits: int, clip: float) -> LayerSpec:
    return LayerSpec(out_features, blocks * n1 * n2, blocks, n1, n2, rank, bits, clip)


@functools.cache
def _properties(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; the interpreter counts as a large recent GPU."""
    if device.type != "cuda":
        return (9, 0), 132
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def _layer(
    x: Tensor,
    weight_chunks: Tensor,
    weight_scale: Tensor,
    split_counters: Tensor,
    left_split: Tensor,
    right_split: Tensor,
    column_scale: Tensor,
    low_rank_a: Tensor | None,
    low_rank_b: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    blocks: int,
    n1: int,
    n2: int,
    rank: int,
    bits: int,
    clip: float,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    silu_mul: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The layer's output, and x + residual where a residual is given; arguments as those of `prepare_input`."""
    from bwla_kernels.triton.binary_matmul import Activations, Weights, binary_matmul
    from bwla_kernels.triton.layout import chunk_layout
    from bwla_kernels.triton.prepare_input import prepare_input
    from bwla_kernels.triton.tuning import BINARY, select_config

    spec = _spec(out_features, blocks, n1, n2, rank, bits, clip)
    rows = _rows(x, spec.in_features * (2 if silu_mul else 1))
    layout = chunk_layout(out_features, blocks, spec.group_width)
    capability, multiprocessors = _properties(x.device)
    config = select_config(
        out_features, spec.in_features, blocks, layout.chunk, len(rows), bits, capability, multiprocessors
    )
    side = {
        "left_split": left_split,
        "right_split": right_split,
        "column_scale": column_scale,
        "split_counters": split_counters,
    }
    pdl = is_dependent(x.device)
    if low_rank_a is not None:
        side["low_rank_a"] = low_rank_a
    prepared = prepare_input(
        rows,
        side,
        spec,
        planes=config.kernel == BINARY,
        chunk=layout.chunk,
        norm_weight=norm_weight,
        eps=eps,
        residual=None if residual is None else _rows(residual, spec.in_features),
        silu_mul=silu_mul,
        dependent_launch=pdl,
    )
    activations = Activations(prepared.q, prepared.scale, prepared.q_sum, prepared.u, prepared.planes)
    weights = Weights(weight_chunks, weight_scale, low_rank_b, bias, split_counters, layout)
    y = binary_matmul(activations, weights, bits, config, x.dtype, pdl).reshape(*x.shape[:-1], out_features)
    return y, None if prepared.residual is None else prepared.residual.reshape(x.shape)


def _rows(x: Tensor, width: int) -> Tensor:
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _linear(x: Tensor, *layer: Any) -> Tensor:
    return _layer(x, *layer)[0]


def _rms_norm_linear(x: Tensor, *arguments: Any) -> Tensor:
    *layer, norm_weight, eps = arguments
    _warm_up_fused("norm", x, layer, norm_weight)
    return _layer(x, *layer, norm_weight=norm_weight, eps=eps)[0]


def _add_rms_norm_linear(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *layer, norm_weight, eps, residual = arguments
    _warm_up_fused("add+norm", x, layer, norm_weight)
    y, total = _layer(x, *layer, norm_weight=norm_weight, eps=eps, residual=residual)
    assert total is not None
    return y, total


def _silu_mul_linear(x: Tensor, *layer: Any) -> Tensor:
    _warm_up_fused("silu*mul", x, layer)
    return _layer(x, *layer, silu_mul=True)[0]


def _warm_up_fused(fused: str, x: Tensor, layer: Sequence[Any], norm_weight: Tensor | None = None) -> None:
    """Check and compile, once a process and kind of layer, what other numbers of tokens will need.

    `prepare` cannot know what a compiler fuses. A server runs its model once before it captures CUDA graphs and
    before it takes requests, which is when this happens.
    """
    if x.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    from bwla_kernels.triton.warm_up import warm_up

    tensors = {name: tensor for name, tensor in zip(_TENSORS, layer, strict=False) if tensor is not None}
    spec = _spec(*layer[len(_TENSORS) :])
    warm_up(spec, tensors, x.dtype, *_properties(x.device), fused=fused, norm_weight=norm_weight)


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
"""A layer's arguments after x, before its sizes."""


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


def repack(tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """A layer's stored tensors in the kernels' form, on the same device; compiles nothing."""
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
    """W1A2..8 on NVIDIA GPUs from compute capability 8.0 on."""

    name = "triton"

    def can_implement(self, spec: LayerSpec, device: torch.device) -> tuple[bool, str]:
        """Layers on such a GPU with quantized activations, where Triton is installed."""
        if device.type != "cuda":
            return False, f"the Triton kernels run on an NVIDIA GPU, not on {device}"
        if spec.bits == UNQUANTIZED_BITS:
            return False, "the Triton kernels need quantized activations (2 to 8 bits)"
        if importlib.util.find_spec("triton") is None:
            return False, "Triton is not installed: pip install triton"
        if torch.version.hip is not None:
            return False, "the Triton kernels are written for NVIDIA GPUs, found an AMD GPU"
        capability, _ = _properties(device)
        if capability < MIN_CAPABILITY:
            found, wanted = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
            return False, f"the Triton kernels need compute capability {wanted} or newer, found {found}"
        from bwla_kernels.triton.prepare_input import can_prepare

        able, reason = can_prepare(spec)
        return (
            (able, reason)
            if not able
            else (True, f"Triton on compute capability {capability[0]}.{capability[1]}")
        )

    def prepare(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Repack the weights, split the rotations, and compile every kernel that a request may need.

        Raises:
            BackendError: a kernel computes wrong numbers with this GPU and Triton.
        """
        prepared = repack(tensors, spec)
        device = prepared["weight_scale"].device
        if device.type == "cuda":
            from bwla_kernels.triton.warm_up import warm_up

            warm_up(spec, prepared, torch.get_default_dtype(), *_properties(device))
        return prepared

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
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
        )
        return y

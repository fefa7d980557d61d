"""The GPU backend: two Triton kernels behind the interface of `ops.Backend`, as a torch.library op.

Triton is imported when a layer first needs it: a machine without a GPU need not have it.
"""

import functools
import importlib.util
from collections.abc import Mapping

import torch
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import UNQUANTIZED_BITS
from torch import Tensor

MIN_CAPABILITY = (8, 0)
_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LIBRARY.define(
    "linear_triton(Tensor x, Tensor weight_chunks, Tensor weight_scale, Tensor split_counters, Tensor left_split, "
    "Tensor right_split, Tensor column_scale, Tensor? low_rank_a, Tensor? low_rank_b, Tensor? bias, "
    "int out_features, int blocks, int n1, int n2, int rank, int bits, float clip) -> Tensor"
)


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


def _linear(
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
) -> Tensor:
    from bwla_kernels.triton.binary_matmul import Activations, Weights, binary_matmul
    from bwla_kernels.triton.layout import chunk_layout
    from bwla_kernels.triton.prepare_input import prepare_input
    from bwla_kernels.triton.tuning import BINARY, select_config

    spec = _spec(out_features, blocks, n1, n2, rank, bits, clip)
    rows = x.reshape(-1, spec.in_features)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    layout = chunk_layout(out_features, blocks, spec.block_width)
    capability, multiprocessors = _properties(x.device)
    config = select_config(
        out_features, spec.in_features, blocks, layout.chunk, len(rows), bits, capability, multiprocessors
    )
    side = {"left_split": left_split, "right_split": right_split, "column_scale": column_scale}
    if low_rank_a is not None:
        side["low_rank_a"] = low_rank_a
    prepared = prepare_input(rows, side, spec, planes=config.kernel == BINARY, chunk=layout.chunk)
    activations = Activations(prepared.q, prepared.scale, prepared.q_sum, prepared.u, prepared.planes)
    weights = Weights(weight_chunks, weight_scale, low_rank_b, bias, split_counters, layout)
    y = binary_matmul(activations, weights, bits, config, x.dtype)
    return y.reshape(*x.shape[:-1], out_features)


def _linear_fake(x: Tensor, weight_chunks: Tensor, weight_scale: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_scale.shape[0])


_LIBRARY.impl("linear_triton", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("bwla::linear_triton", _linear_fake, lib=_LIBRARY)


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
        from bwla_kernels.triton.binary_matmul import prepare_weights
        from bwla_kernels.triton.prepare_input import split_rotations

        left, right = split_rotations(tensors["rotation_left"], tensors["rotation_right"])
        prepared = prepare_weights(tensors, spec)
        prepared |= {
            "left_split": left,
            "right_split": right,
            "column_scale": tensors["column_scale"].contiguous(),
        }
        if spec.rank:
            prepared["low_rank_a"] = tensors["low_rank_a"].contiguous()
        if left.device.type == "cuda":
            from bwla_kernels.triton.warm_up import warm_up

            warm_up(
                spec,
                left.device,
                torch.get_default_dtype(),
                *_properties(left.device),
                lambda x: self.apply(x, prepared, spec),
            )
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
            spec.blocks,
            spec.n1,
            spec.n2,
            spec.rank,
            spec.bits,
            spec.clip,
        )
        return y

"""Other methods for a linear on a GPU, each as a function that makes a layer of random weights.

A method that is not installed raises when it is called; there is no fallback. `gpu.layer_table.measure_method` checks
the result of a method before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A method.

    Attributes:
        name: key in the result.
        bits: stored bits per weight.
        make: function of (N, K) that returns a layer on the current GPU: x bfloat16 [M, K] -> bfloat16 [M, N].
    """

    name: str
    bits: float
    make: Callable[[int, int], Layer]


def cublas_bf16(n: int, k: int) -> Layer:
    """Return torch's bf16 matmul."""
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch.nn.functional.linear(x, weight)


def humming_w1a8(n: int, k: int) -> Layer:
    """Return a layer of Humming: unsigned 1-bit weights, int8 activations that its own kernel quantizes."""
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": "uint1"},
        input_config={"dtype": "int8"},
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_unquantized(torch.randn(n, k, dtype=torch.bfloat16, device="cuda"))
    layer.transform()
    return lambda x: layer(x)


def gemlite_w1a8(n: int, k: int) -> Layer:
    """Return a layer of GemLite: {0, 1} weights with one scale per row, int8 activations with dynamic scales."""
    from gemlite.core import DType, GemLiteLinearTriton

    layer = GemLiteLinearTriton(
        1,
        group_size=k,
        in_features=k,
        out_features=n,
        input_dtype=DType.INT8,
        output_dtype=DType.BF16,
        scaled_activations=True,
    )
    ones = torch.randint(0, 2, (n, k), dtype=torch.uint8, device="cuda")
    scales = torch.rand(n, 1, dtype=torch.bfloat16, device="cuda")
    layer.pack(ones, scales=scales, zeros=None, bias=None)
    return lambda x: layer(x)


def marlin_int4(n: int, k: int) -> Layer:
    """Return Marlin as vLLM uses it for GPTQ's int4 with groups of 128."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    device = torch.device("cuda")
    packed = torch.randint(-(2**31), 2**31 - 1, (k // 8, n), dtype=torch.int32, device=device)
    none = marlin_utils.marlin_make_empty_g_idx(device)
    weight = ops.gptq_marlin_repack(packed, none, k, n, 4)
    scales = torch.rand(k // 128, n, dtype=torch.bfloat16, device=device)
    scales = marlin_utils.marlin_permute_scales(scales, k, n, 128)
    workspace = marlin_utils.marlin_make_workspace_new(device)
    return lambda x: marlin_utils.apply_gptq_marlin_linear(
        x, weight, scales, none, none, none, workspace, scalar_types.uint4b8, n, k, is_k_full=True
    )


PEERS = (
    Peer("cublas_bf16", 16, cublas_bf16),
    Peer("humming_w1a8", 1, humming_w1a8),
    Peer("gemlite_w1a8", 1, gemlite_w1a8),
    Peer("marlin_int4", 4, marlin_int4),
)

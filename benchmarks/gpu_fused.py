"""What fusing a norm or SiLU * mul into a BWLA layer on a GPU saves, in CUDA graphs with cold caches.

    python benchmarks/gpu_fused.py --out benchmarks/results/gpu_fused.json

Layers that read one rotation block follow a residual addition and an RMSNorm (qkv, gate_up), the others SiLU * mul
(down). `separate_us` is that step as one kernel of torch's compiler and then the layer, `fused_us` the fused op.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bwla_converter.dummy import random_layer
from bwla_kernels import ops
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from cpu_layer import SHAPES
from gpu_layer import RANK, TOKENS, copies_for, microseconds
from gpu_peers import Layer
from record import write_result
from torch import Tensor

EPSILON = 1e-6


def add_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of x + x, which stands for x + residual, as vLLM rounds it."""
    total = x.float() + x.float()
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPSILON)
    return normed.to(weight.dtype) * weight


def silu_mul(x: Tensor, _: Tensor) -> Tensor:
    """silu(gate) * up of x = [gate, up]."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def pairs(spec: LayerSpec) -> tuple[list[Layer], list[Layer]]:
    """Copies of the layer behind its step, in two kernels more, and fused."""
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    stored = {name: tensor.to(device) for name, tensor in random_layer(spec, generator).items()}
    backend, _ = ops.select_backend(spec, device, "triton")
    first = backend.prepare(stored, spec)
    copies = copies_for(1, spec.out_features, spec.in_features)
    tensors = [first] + [{name: tensor.clone() for name, tensor in first.items()} for _ in range(copies - 1)]
    weight = torch.ones(spec.in_features, dtype=torch.bfloat16, device=device)
    norms = spec.blocks == 1
    step: Callable[..., Tensor] = torch.compile(add_norm if norms else silu_mul, dynamic=False)

    def separate(own: dict[str, Tensor]) -> Layer:
        return lambda x: backend.apply(step(x, weight), own, spec)

    def fused(own: dict[str, Tensor]) -> Layer:
        names = (
            "weight_chunks",
            "weight_scale",
            "split_counters",
            "left_split",
            "right_split",
            "column_scale",
        )
        optional = ("low_rank_a", "low_rank_b", "bias")
        sizes = (spec.out_features, spec.blocks, spec.n1, spec.n2, spec.rank, spec.bits, spec.clip)
        layer = (*(own[name] for name in names), *(own.get(name) for name in optional), *sizes)
        if norms:
            return lambda x: torch.ops.bwla.add_rms_norm_linear_triton(x, *layer, weight, EPSILON, x)[0]
        return lambda x: torch.ops.bwla.silu_mul_linear_triton(x, *layer)

    return [separate(own) for own in tensors], [fused(own) for own in tensors]


def measure(n: int, k: int, wished: int, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each number of tokens."""
    spec = LayerSpec(n, k, *choose_rotation(k, wished), rank=RANK)
    separate, fused = pairs(spec)
    rows = []
    for m in tokens:
        columns = k if spec.blocks == 1 else 2 * k
        x = torch.randn(m, columns, dtype=torch.bfloat16, device="cuda")
        row: dict[str, Any] = {"n": n, "k": k, "m": m, "step": "add+norm" if spec.blocks == 1 else "silu*mul"}
        row["separate_us"], row["fused_us"] = microseconds(separate, x), microseconds(fused, x)
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="32b", help="Qwen3 shapes (32b)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="values of M")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU, found none")
    tokens = [int(m) for m in arguments.tokens.split(",")]
    rows: list[dict[str, Any]] = []
    for name in arguments.models.split(","):
        for shape in SHAPES[name]:
            rows += measure(*shape, tokens)
            if arguments.out:
                write_result(arguments.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

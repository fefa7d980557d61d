"""Time the one-bit experts of one layer and vLLM's bf16 experts on this machine's CPU, side by side in one process.

    python -m benchmarks.kernels.cpu_experts --out benchmarks/results/cpu_experts.json
    python -m benchmarks.kernels.cpu_experts --tokens 1 --ranks 0 --seconds 2

The shape is that of a layer of Qwen3-30B-A3B (H 2,048, I 768, 128 experts, top 8). For each number of tokens, these
are timed in turn for many rounds: a plain read of memory, the one-bit experts with each rank, and vLLM's bf16 experts
(the op that it calls for this processor, with prepacked weights). Each call uses the next of several random routings,
uniform over the experts, whose weights exceed the caches together. The router itself is not timed.

Figures are medians. `bound_us` is the time that reading the weights of the chosen experts takes at the measured speed
of a plain read: no implementation with these weights can be faster. Ratios are medians of those within each round. With
`--processor-time`, for one thread, the time in which other processes had the core is left out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path

import torch
from bwla_kernels import ops
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.experts.spec import stacked_specs
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from torch import Tensor

from benchmarks.common.record import write_result
from benchmarks.kernels.cpu_layer import Step, last_level_cache, read_step, time_in_turn

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 768, 128, 8
"""A layer of Qwen3-30B-A3B."""

ROUTINGS = 16
TOKENS, RANKS = "1,8,64,512", "0,16"


def make_spec(rank: int) -> ExpertsSpec:
    """Return the layer with the converter's default rotations: one group of H, eight of I, for tensor parallelism."""
    return ExpertsSpec(
        EXPERTS,
        LayerSpec(2 * INNER, HIDDEN, *choose_rotation(HIDDEN), rank=rank),
        LayerSpec(HIDDEN, INNER, *choose_rotation(INNER, 8), rank=rank),
    )


def random_projection(spec: LayerSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Return stacked tensors with random signs and identity rotations, which take as long as any."""
    tensors = {}
    for name, want in stacked_specs(EXPERTS, spec).items():
        dtype = want.dtypes[0]
        if name == "weight_packed":
            tensors[name] = torch.randint(-(2**31), 2**31, want.shape, generator=generator).to(dtype)
        elif name.startswith("rotation"):
            tensors[name] = torch.eye(want.shape[-1], dtype=dtype).expand(want.shape).contiguous()
        else:
            tensors[name] = torch.full(want.shape, 0.02, dtype=dtype)
    return tensors


def routings(tokens: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Return weights float32 and ids int32 [M, top-k] of uniformly chosen experts."""
    logits = [torch.randn(tokens, EXPERTS, generator=generator) for _ in range(ROUTINGS)]
    chosen = [one.softmax(-1).topk(TOP_K) for one in logits]
    return [(top.values / top.values.sum(-1, keepdim=True), top.indices.to(torch.int32)) for top in chosen]


def bwla_step(rank: int, x: Tensor, routes: list[tuple[Tensor, Tensor]]) -> tuple[Step, int]:
    """Return the call of the one-bit experts, and the packed bytes of one expert."""
    spec, generator = make_spec(rank), torch.Generator().manual_seed(rank)
    backend, reason = ops.select_experts_backend(spec, x.device)
    if backend.name != "cpu":
        raise SystemExit(f"the CPU kernel is not in use here: {reason}")
    tensors = backend.prepare(
        random_projection(spec.gate_up, generator), random_projection(spec.down, generator), spec
    )
    size = sum(tensor.nbytes for tensor in tensors.values()) // EXPERTS
    return lambda i: backend.apply(x, *routes[i % ROUTINGS], tensors, spec), size


def bf16_weights() -> tuple[Callable[..., None], Tensor, Tensor, str]:
    """Return vLLM's op for bf16 experts, both prepacked weights, and the name of its variant."""
    from vllm import _custom_ops as custom
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
        CPUUnquantizedExperts,
        X86CPUUnquantizedExperts,
    )

    variant = X86CPUUnquantizedExperts if torch.cpu._is_amx_tile_supported() else CPUUnquantizedExperts
    shapes = ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
    weights = [
        custom.cpu_prepack_moe_weight(torch.full(shape, 0.02, dtype=torch.bfloat16), variant.isa)
        for shape in shapes
    ]
    return custom.cpu_fused_moe, *weights, variant.isa


def measure(tokens: int, ranks: list[int], budget: float, clock: Callable[[], float]) -> dict[str, object]:
    """Time one number of tokens with a clock; return a row of the result."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    routes = routings(tokens, generator)
    used = statistics.mean(len(ids.unique()) for _, ids in routes)
    fused, w13, w2, isa = bf16_weights()
    out = torch.empty_like(x)

    def vllm(i: int) -> None:
        fused(out, x, w13, w2, None, None, *routes[i % ROUTINGS], "silu", isa)

    cold = 3 * last_level_cache()
    steps = [bwla_step(rank, x, routes) for rank in ranks]
    read, bf16, *times = time_in_turn(
        [read_step(cold), vllm, *(step for step, _ in steps)], budget, clock=clock
    )
    speed = cold / statistics.median(read)  # bytes in a microsecond
    row: dict[str, object] = {
        "m": tokens,
        "experts_used": round(used, 1),
        "read_gbps": round(speed / 1e3, 1),
        "vllm_bf16_us": round(statistics.median(bf16), 1),
        "vllm_bf16_bound_us": round(used * 6 * INNER * HIDDEN / speed, 1),
        "vllm_variant": isa,
    }
    for rank, samples, (_, size) in zip(ranks, times, steps, strict=True):
        row[f"bwla_rank{rank}_us"] = round(statistics.median(samples), 1)
        row[f"bwla_rank{rank}_bound_us"] = round(used * size / speed, 1)
        row[f"bf16_to_bwla_rank{rank}"] = round(statistics.median(map(truediv, bf16, samples)), 2)
    return row


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default=TOKENS, help=f"numbers of tokens, joined by commas ({TOKENS})")
    parser.add_argument("--ranks", default=RANKS, help=f"ranks of the low-rank correction ({RANKS})")
    parser.add_argument("--seconds", type=float, default=15.0, help="time for each number of tokens (15)")
    parser.add_argument(
        "--processor-time", action="store_true", help="leave out the time of other processes (one thread)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    if arguments.processor_time and torch.get_num_threads() > 1:
        parser.error("--processor-time needs one thread: it adds up the time of all, set OMP_NUM_THREADS=1")
    clock = time.process_time if arguments.processor_time else time.perf_counter
    ranks, rows = [int(rank) for rank in arguments.ranks.split(",")], []
    for tokens in map(int, arguments.tokens.split(",")):
        rows.append(measure(tokens, ranks, arguments.seconds, clock))
        print(rows[-1], flush=True)
    if arguments.out:
        shape = {"hidden": HIDDEN, "inner": INNER, "experts": EXPERTS, "top_k": TOP_K}
        shared = {"cores_allowed": len(os.sched_getaffinity(0)), "clock": clock.__name__}
        write_result(arguments.out, rows, threads=torch.get_num_threads(), shape=shape, **shared)


if __name__ == "__main__":
    main()

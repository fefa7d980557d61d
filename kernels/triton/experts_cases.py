"""Every configuration of the experts' grouped GEMM, as compile cases."""

from dataclasses import replace

from bwla_kernels.triton.compiling import CompileCase, signature_of
from bwla_kernels.triton.epilogue import RANK_STEP
from bwla_kernels.triton.experts import FEW, MANY, ExpertsConfig, grouped_meta
from bwla_kernels.triton.experts_kernel import experts_mma_kernel
from bwla_kernels.triton.layout import ChunkLayout, chunk_layout
from bwla_kernels.triton.matmul_cases import INTEGER_MNEMONICS

LAYOUTS = {
    "gate and up": chunk_layout(1536, 1, 2048),
    "down, 8 padded groups": chunk_layout(2048, 8, 96),
}
"""Qwen3-30B-A3B's."""

POINTERS = {
    "q": "*i8",
    "scale": "*fp32",
    "q_sum": "*i32",
    "u": "*fp32",
    "weight": "*u8",
    "weight_scale": "*fp32",
    "low_b": "*bf16",
    "bias": "*bf16",
    "router": "*fp32",
    "sorted_pairs": "*i32",
    "tile_experts": "*i32",
    "y": "*fp32",
}


def compile_cases(arch: int) -> list[CompileCase]:
    """Return all cases for compute capability `arch` / 10; several planes, rank 0 and a bias for each tile once."""
    cases = []
    for config in (FEW, MANY):
        for name, layout in LAYOUTS.items():
            cases.append(_case(config, layout, name, arch, RANK_STEP))
        layout = LAYOUTS["gate and up"]
        cases.append(_case(config, layout, "gate and up", arch, 0))
        cases.append(_case(config, layout, "gate and up", arch, RANK_STEP, bias=True))
        cases.append(_case(config, replace(layout, planes=2), "gate and up, 2 planes", arch, RANK_STEP))
    return cases


def _case(
    config: ExpertsConfig, layout: ChunkLayout, what: str, arch: int, rank: int, bias: bool = False
) -> CompileCase:
    """Build a case with types and divisibility as at a launch; down multiplies by the router's weights."""
    weighted = what.startswith("down")
    absent = ("u", "low_b") * (rank == 0) + ("bias",) * (not bias) + ("router",) * (not weighted)
    constexprs = {
        **grouped_meta(layout, config),
        "RANK": rank,
        "BIAS": bias,
        "WEIGHTED": weighted,
        "PURE": False,
        **dict.fromkeys(absent),
    }
    signature = signature_of(experts_mma_kernel, constexprs, POINTERS)
    round_or_pointer = ("N", "rows", "K", "block_width", *POINTERS)
    return CompileCase(
        name=experts_mma_kernel.fn.__name__,
        config=f"{config}, {what}{', rank 0' * (rank == 0)}{', bias' * bias}",
        kernel=experts_mma_kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(n for n, kind in signature.items() if kind != "constexpr" and n in round_or_pointer),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_core=INTEGER_MNEMONICS[arch],
        loop_weights=config.block_n * layout.chunk * layout.planes,
        planes=layout.planes,
    )

"""Every configuration of the matmul kernels that can be selected, as compile cases."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bwla_kernels.triton.binary_matmul import (
    GROUP_M,
    binary_meta,
    integer_meta,
)
from bwla_kernels.triton.binary_mma import binary_mma_kernel
from bwla_kernels.triton.compiling import CompileCase, signature_of
from bwla_kernels.triton.epilogue import RANK_STEP
from bwla_kernels.triton.integer_mma import integer_mma_kernel
from bwla_kernels.triton.layout import ChunkLayout, chunk_layout
from bwla_kernels.triton.pdl import PDL_EARLY
from bwla_kernels.triton.tuning import BINARY, MatmulConfig, fit_unroll, selectable

BITS = 6

LAYOUTS = {
    "1 block": chunk_layout(51200, 1, 5120),
    "1 padded block": chunk_layout(5120, 1, 5152),
    "8 blocks, chunks of 128": chunk_layout(5120, 8, 3200),
    "8 padded blocks": chunk_layout(5120, 8, 1056),
}
"""Qwen3-32B's gate_up and down, and both with partly empty chunks (the masked variants). The names are keys of compile
tables; a block is a rotation group."""

PLANE_LAYOUTS = {
    2: ("1 block", "8 blocks, chunks of 128"),
    3: ("1 block", "8 blocks, chunks of 128"),
    4: ("1 block", "8 blocks, chunks of 128", "8 padded blocks"),
}
"""Number of planes -> the layouts that are compiled for it; one plane is compiled for all."""

INTEGER_MNEMONICS = {80: ("IMMA",), 89: ("IMMA",), 90: ("IGMMA",), 100: ("UTCIMMA", "UTCQMMA", "IMMA")}
"""Int8 tensor-core instructions in SASS: mma.sync, wgmma, tcgen05.mma."""

_POINTERS = {
    "planes": "*i32",
    "q": "*i8",
    "scale": "*fp32",
    "q_sum": "*i32",
    "u": "*fp32",
    "weight_scale": "*fp32",
    "low_b": "*bf16",
    "bias": "*bf16",
    "y": "*bf16",
    "partial": "*fp32",
    "counters": "*i32",
}


@dataclass(frozen=True)
class Variant:
    """Options of a launch: `pdl` is a dependent launch, `bare` has neither low-rank term nor bias, `rank` is padded."""

    pdl: bool = False
    bare: bool = False
    rank: int = RANK_STEP

    def __str__(self) -> str:
        rank = f", rank {self.rank}" * (self.rank != RANK_STEP)
        return rank + ", dependent launch" * self.pdl + ", bare" * self.bare


WIDER = [Variant(rank=rank) for rank in (2 * RANK_STEP, 3 * RANK_STEP, 4 * RANK_STEP)]
"""Other padded ranks, compiled for the most common layout."""


def compile_cases(arch: int) -> list[CompileCase]:
    """Return all cases for compute capability `arch` / 10: with a low-rank term and a bias, bfloat16 out.

    Launches are dependent from 9.0 on, as in serving; a layer without both, and launches that do not overlap, are
    compiled for the most common layout. Weights of several planes are compiled as in serving.
    """
    cases: list[CompileCase] = []
    served = Variant(pdl=arch >= 90)
    for name, layout in LAYOUTS.items():
        variants = [served]
        if name == "1 block":
            variants += [replace(served, bare=True)] + [Variant()] * served.pdl + WIDER
        cases += _cases_of(layout, name, arch, variants)
    for planes, names in PLANE_LAYOUTS.items():
        for name in names:
            layout = replace(LAYOUTS[name], planes=planes)
            cases += _cases_of(layout, f"{name}, {planes} planes", arch, [served])
    return cases


def _cases_of(
    layout: ChunkLayout, what: str, arch: int, variants: Sequence[Variant]
) -> Iterator[CompileCase]:
    """Yield the cases of a layout in every configuration that can be selected for it."""
    selected = selectable(str(arch), layout.groups == 1, layout.planes)
    for chosen in selected:
        config = chosen
        if config.kernel == BINARY:
            config = fit_unroll(config, layout.groups, layout.chunks_per_group, layout.chunk)
        if config.split > 2:
            continue  # the same code as for two shares: their number is not a compile-time argument
        for variant in variants:
            if config.kernel == BINARY:
                yield binary_case(config, layout, what, variant)
            else:
                yield integer_case(config, layout, what, arch, variant)


def _case(
    kernel: Any,
    config: MatmulConfig,
    what: str,
    weight: str,
    meta: dict[str, Any],
    tensor_core: tuple[str, ...],
    loop_weights: int,
    variant: Variant,
) -> CompileCase:
    """Build a case with types and divisibility as at a launch: aligned tensors, sizes divisible by 16.

    The numbers of tokens and ranks need not be.
    """
    absent = ("u", "low_b", "bias") * variant.bare + ("partial", "counters") * (config.split == 1)
    constexprs = {
        **meta,
        "RANK": 0 if variant.bare else variant.rank,
        "BIAS": not variant.bare,
        "PDL": PDL_EARLY.value if variant.pdl else 0,
        "PURE": False,
        **{name: None for name in absent if name in kernel.arg_names},
    }
    pointers = {**_POINTERS, "weight": weight}
    signature = signature_of(kernel, constexprs, pointers)
    round_or_pointer = ("N", "rows", "K", "block_width", *pointers)
    return CompileCase(
        name=kernel.fn.__name__,
        config=f"{config}, {what}{variant}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(n for n, kind in signature.items() if kind != "constexpr" and n in round_or_pointer),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_core=tensor_core,
        loop_weights=loop_weights,
        options={"launch_pdl": variant.pdl, "maxnreg": config.max_registers or None},
    )


def binary_case(
    config: MatmulConfig, layout: ChunkLayout, what: str, variant: Variant | None = None
) -> CompileCase:
    """Return a case of `binary_mma_kernel`; one iteration covers 512 columns of every warp's rows."""
    meta = binary_meta(layout, BITS, config)
    weights = 512 * config.block_n * config.k_warps * layout.planes
    case = _case(binary_mma_kernel, config, what, "*i32", meta, ("BMMA",), weights, variant or Variant())
    layout_of_fragments = (
        "#ttg.blocked<{sizePerThread=[1,4],threadsPerWarp=[1,32],"
        f"warpsPerCTA=[1,{config.num_warps}],order=[1,0]}}>"
    )
    return replace(case, fragment_layout=layout_of_fragments, planes=layout.planes)


def integer_case(
    config: MatmulConfig, layout: ChunkLayout, what: str, arch: int, variant: Variant | None = None
) -> CompileCase:
    """Return a case of `integer_mma_kernel`; one iteration covers a chunk."""
    meta = {**integer_meta(layout, config), "GROUP_M": GROUP_M}
    weights = config.block_n * layout.chunk * layout.planes
    core = INTEGER_MNEMONICS[arch]
    case = _case(integer_mma_kernel, config, what, "*u8", meta, core, weights, variant or Variant())
    return replace(case, planes=layout.planes)

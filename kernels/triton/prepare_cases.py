"""Every configuration of the input transform that serving can select, for the ahead-of-time check."""

from collections.abc import Iterator

import torch
from bwla_kernels.factorize import SHARDED_ROTATION_GROUPS, choose_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton.compiling import CompileCase
from bwla_kernels.triton.few_kernel import prepare_few_kernel
from bwla_kernels.triton.fused_load import ADD_NORM, NORM, PLAIN, SILU_MUL
from bwla_kernels.triton.launch import EARLY, OFF
from bwla_kernels.triton.layout import chunk_columns
from bwla_kernels.triton.prepare_config import (
    FEW_REGISTERS,
    FILLS_GPU,
    PLANES_MAX_TOKENS,
    FewConfig,
    InputConfig,
    few_constants,
    few_tokens,
    launch_constants,
    select_config,
)
from bwla_kernels.triton.prepare_kernel import prepare_input_kernel

HIDDEN = (1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 8192)
"""Input widths of q, k, v, gate and up: Qwen3-0.6B to 32B, Qwen2.5-1.5B to 72B, Llama-2 and 3, Mistral, Phi-3."""

ATTENTION = (1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 8192)
"""Input widths of o, split into rotation groups for tensor parallelism."""

INTERMEDIATE = (3072, 6144, 8192, 11008, 12288, 13824, 14336, 17408, 18944, 25600, 27648, 28672)
"""Input widths of down, split likewise."""

WIDE = ((8, 40, 128), (1, 64, 128), (1, 96, 128), (1, 112, 128), (1, 128, 128))
"""Further rotations that the converter supports, up to the largest factors."""

RANK = 16

RANKS = (0, 1, 5, 32, 35, 48, 64)
"""Other ranks, compiled for one rotation (the most common one of large models): they determine tile sizes."""

TENSOR_CORE = {80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA")}

_TYPES = {
    "left_ptr": "*fp16",
    "right_ptr": "*fp16",
    "column_scale_ptr": "*fp32",
    "a_ptr": "*bf16",
    "q_ptr": "*i8",
    "scale_ptr": "*fp32",
    "q_sum_ptr": "*i32",
    "u_ptr": "*fp32",
    "planes_ptr": "*i32",
    "turned_ptr": "*fp32",
    "u_parts_ptr": "*fp32",
    "counters_ptr": "*i32",
    "m": "i32",
    "x_stride": "i32",
    "residual_stride": "i32",
    "level": "fp32",
    "eps": "fp32",
}


def compile_cases(arch: int) -> list[CompileCase]:
    """Return the cases for compute capability `arch` / 10: fused loads as in models, launches as in serving."""
    pdl = EARLY if arch >= 90 else OFF
    hidden = {choose_rotation(width) for width in HIDDEN}
    sharded = {choose_rotation(width, SHARDED_ROTATION_GROUPS) for width in (*ATTENTION, *INTERMEDIATE)}
    down = {choose_rotation(width, SHARDED_ROTATION_GROUPS) for width in INTERMEDIATE}
    cases = []
    for rotation in sorted({*hidden, *sharded, *WIDE}):
        spec = LayerSpec(1024, rotation[0] * rotation[1] * rotation[2], *rotation, rank=RANK)
        fused = [
            PLAIN,
            *([NORM, ADD_NORM] if rotation in hidden else []),
            *([SILU_MUL] if rotation in down else []),
        ]
        for m, config in _configurations(spec, arch):
            for fuse in fused:
                planes = chunk_columns(spec.group_width)
                for chunk in (0, planes) if m <= PLANES_MAX_TOKENS else (0,):
                    cases.append(compile_case_of(spec, config, arch, torch.bfloat16, fuse, chunk, pdl))
    wide = choose_rotation(5120)
    for rank in RANKS:
        spec = LayerSpec(1024, 5120, *wide, rank=rank)
        cases += [
            compile_case_of(spec, config, arch, torch.bfloat16, ADD_NORM, 0, pdl)
            for _, config in _configurations(spec, arch)
        ]
    return cases


def _configurations(spec: LayerSpec, arch: int) -> Iterator[tuple[int, InputConfig | FewConfig]]:
    """Yield each configuration of a layer, with the smallest number of tokens that selects it."""
    selected = set()
    for m in sorted(edge + 1 for edge in (0, few_tokens(spec), FILLS_GPU // spec.rotation_groups)):
        config = select_config(spec, m, divmod(arch, 10))
        if config not in selected:
            selected.add(config)
            yield m, config


def compile_case_of(
    spec: LayerSpec,
    config: InputConfig | FewConfig,
    arch: int,
    dtype: torch.dtype,
    fuse: int,
    chunk: int,
    pdl: int = OFF,
) -> CompileCase:
    """Return one configuration as the launcher would compile it, for aligned tensors."""
    few = isinstance(config, FewConfig)
    kernel = prepare_few_kernel if few else prepare_input_kernel
    if isinstance(config, FewConfig):
        constants = few_constants(spec, config, dtype, fuse, chunk, pdl)
        tiles = f"few, u {config.slices}x{config.step}"
    else:
        constants = launch_constants(spec, config, dtype, torch.bfloat16 if spec.rank else None, fuse, pdl)
        tiles = (
            f"tokens {config.tokens} pieces {config.piece or 'equal'}/{config.out_piece or 'equal'} "
            f"u {config.u_tokens}x{config.u_ranks}x{config.u_step}"
        )
    stored = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    types = {
        **_TYPES,
        **dict.fromkeys(("x_ptr", "residual_ptr", "norm_weight_ptr", "residual_out_ptr"), stored),
    }
    absent = []
    if fuse not in (NORM, ADD_NORM):
        absent.append("norm_weight_ptr")
    if fuse != ADD_NORM:
        absent += ["residual_ptr", "residual_out_ptr"]
    if not spec.rank:
        absent += ["a_ptr", "u_ptr", "u_parts_ptr"]
    if not chunk:
        absent.append("planes_ptr")
    names = kernel.arg_names
    constexprs = {**constants, **{name: None for name in absent if name in names}}
    signature = {name: "constexpr" if name in constexprs else types[name] for name in names}
    variant = {PLAIN: "", NORM: " norm", ADD_NORM: " add+norm", SILU_MUL: " silu*mul"}[fuse]
    planes = " planes" if chunk else ""
    rank = "" if spec.rank == RANK else f", rank {spec.rank}"
    overlap = ", dependent launch" * bool(pdl)
    return CompileCase(
        name="prepare_few" if few else "prepare_input",
        config=f"({spec.rotation_groups}, {spec.n1}, {spec.n2}){variant}{planes} {tiles}{rank}{overlap}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(name for name, kind in signature.items() if kind.startswith("*") or "stride" in name),
        num_warps=config.num_warps,
        num_stages=3,
        tensor_core=TENSOR_CORE[arch],
        options={
            "launch_pdl": bool(pdl),
            "maxnreg": FEW_REGISTERS if isinstance(config, FewConfig) else config.max_registers,
        },
    )

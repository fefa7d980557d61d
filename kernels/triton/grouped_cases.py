"""Every configuration of the kernels for scales of groups of columns, as compile cases."""

from dataclasses import replace

from bwla_kernels.format import LayerSpec
from bwla_kernels.triton.compiling import CompileCase, signature_of
from bwla_kernels.triton.grouped import CONFIG, grouped_constants, quantize_constants
from bwla_kernels.triton.grouped_kernel import grouped_mma_kernel, quantize_groups_kernel
from bwla_kernels.triton.layout import ChunkLayout, chunk_layout
from bwla_kernels.triton.matmul_cases import INTEGER_MNEMONICS

LAYOUTS = {
    "groups of 128": chunk_layout(4096, 32, 128),
    "groups of 256": chunk_layout(4096, 16, 256),
    "one group of 2560": chunk_layout(2560, 1, 2560),
    "groups of 64": chunk_layout(4096, 64, 64),
}
"""Bonsai-8B's, TQ2_0's and BitNet b1.58 2B-4T's, and one with partly empty chunks."""

POINTERS = {
    "q": "*i8",
    "scale": "*fp32",
    "weight": "*u8",
    "weight_scale": "*fp32",
    "bias": "*bf16",
    "y": "*bf16",
}


def compile_cases(arch: int) -> list[CompileCase]:
    """Return all cases for compute capability `arch` / 10: one plane and two, split with and without a bias."""
    cases = [_quantize_case(layout, name) for name, layout in LAYOUTS.items()]
    for name, layout in LAYOUTS.items():
        for planes in (1, 2):
            cases.append(_case(replace(layout, planes=planes), name, arch))
    layout = LAYOUTS["groups of 128"]
    cases.append(_case(layout, "groups of 128", arch, split=True))
    cases.append(_case(layout, "groups of 128", arch, bias=True))
    cases.append(_case(replace(layout, planes=4), "groups of 128", arch))
    return cases


def _case(layout: ChunkLayout, what: str, arch: int, split: bool = False, bias: bool = False) -> CompileCase:
    constexprs = {
        **grouped_constants(layout, CONFIG, split, bias),
        "PURE": False,
        **({} if bias else {"bias": None}),
    }
    pointers = {**POINTERS, "y": "*fp32" if split else "*bf16"}
    signature = signature_of(grouped_mma_kernel, constexprs, pointers)
    round_or_pointer = ("N", "rows", "K", "group_width", *POINTERS)
    return CompileCase(
        name=grouped_mma_kernel.fn.__name__,
        config=f"{CONFIG}, {what}{', planes ' + str(layout.planes) if layout.planes > 1 else ''}"
        f"{', split' * split}{', bias' * bias}",
        kernel=grouped_mma_kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(n for n, kind in signature.items() if kind != "constexpr" and n in round_or_pointer),
        num_warps=CONFIG.num_warps,
        num_stages=CONFIG.num_stages,
        tensor_core=INTEGER_MNEMONICS[arch],
        loop_weights=CONFIG.block_n * layout.chunk * layout.planes,
        planes=layout.planes,
    )


def _quantize_case(layout: ChunkLayout, what: str) -> CompileCase:
    columns = layout.groups * layout.group_width
    spec = LayerSpec(64, columns, layout.groups, 1, layout.group_width, bits=8, grouped=True)
    constexprs = quantize_constants(spec)
    pointers = {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32", "level": "fp32"}
    signature = signature_of(quantize_groups_kernel, constexprs, pointers)
    return CompileCase(
        name=quantize_groups_kernel.fn.__name__,
        config=what,
        kernel=quantize_groups_kernel,
        signature=signature,
        constexprs=dict(constexprs),
        divisible=("x_ptr", "q_ptr", "scale_ptr", "x_stride"),
        num_warps=4,
        num_stages=3,
        tensor_core=(),
    )

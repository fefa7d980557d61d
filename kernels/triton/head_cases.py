"""Every configuration of the head's kernels that can be selected, as compile cases."""

from typing import Any

from bwla_kernels.triton.compiling import CompileCase, signature_of
from bwla_kernels.triton.head import HeadConfig, matmul_meta, quantize_step, quantize_warps, selectable
from bwla_kernels.triton.head_kernel import head_matmul_kernel, head_quantize_kernel
from bwla_kernels.triton.matmul_cases import INTEGER_MNEMONICS

WIDTHS = (1024, 1056, 2048, 4096, 5120, 8192, 16384)
"""Widths that select every configuration, among them one that is no multiple of a step and one with several passes."""

_POINTERS = {
    "x": "*bf16",
    "codes": "*i8",
    "scale": "*fp32",
    "weight": "*i8",
    "weight_scale": "*fp32",
    "y": "*bf16",
}


def compile_cases(arch: int) -> list[CompileCase]:
    """Return all cases for compute capability `arch` / 10, bfloat16 in and out; dependent launches from 9.0 on."""
    cases = {}
    for pdl in (False, True)[: 1 + (arch >= 90)]:
        for width in WIDTHS:
            for case in (
                quantize_case(width, pdl),
                *(matmul_case(width, c, arch, pdl) for c in selectable(divmod(arch, 10))),
            ):
                cases[case.name, case.config] = case
    return list(cases.values())


def _case(
    kernel: Any,
    config: str,
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int,
    tensor_core: tuple[str, ...] = (),
    loop_weights: int = 0,
) -> CompileCase:
    """Build a case with types and divisibility as at a launch: aligned tensors, sizes divisible by 16 (not tokens)."""
    signature = signature_of(kernel, constexprs, _POINTERS)
    pdl = bool(constexprs["PDL"])
    return CompileCase(
        name=kernel.fn.__name__,
        config=config + ", dependent launch" * pdl,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(name for name, kind in signature.items() if kind != "constexpr" and name != "M"),
        num_warps=num_warps,
        num_stages=num_stages,
        tensor_core=tensor_core,
        loop_weights=loop_weights,
        options={"launch_pdl": pdl},
    )


def quantize_case(width: int, pdl: bool) -> CompileCase:
    """Return a case of `head_quantize_kernel`."""
    step = quantize_step(width)
    constexprs = {"STEP": step, "ONE_STEP": width <= step, "PDL": pdl}
    text = f"{step} columns{'' if width <= step else ' at once'}"
    return _case(head_quantize_kernel, text, constexprs, quantize_warps(step), 3)


def matmul_case(width: int, config: HeadConfig, arch: int, pdl: bool) -> CompileCase:
    """Return a case of `head_matmul_kernel`; one iteration covers a tile of weights."""
    meta = matmul_meta(width, config)
    return _case(
        head_matmul_kernel,
        f"{config}{'' if meta['EVEN'] else ' masked'}",
        {**meta, "PDL": pdl},
        config.num_warps,
        config.num_stages,
        INTEGER_MNEMONICS[arch],
        config.block_n * config.block_k,
    )

"""The kernels of the sign search as compile cases; one compiled kernel serves every number of rows and candidates."""

from typing import Any

from bwla_kernels.triton.compiling import CompileCase
from bwla_kernels.triton.sign_steps import OPTIONS
from bwla_kernels.triton.sign_steps_kernel import ROW_POINTERS, choose_signs_kernel, flip_signs_kernel


def compile_cases(arch: int) -> list[CompileCase]:
    """Return all cases; they are the same for every compute capability `arch` / 10."""
    return [
        case_of(kernel, ragged)
        for kernel in (choose_signs_kernel, flip_signs_kernel)
        for ragged in (False, True)
    ]


def case_of(kernel: Any, ragged: bool) -> CompileCase:
    """Return the case of a kernel, with the types and divisibility of a launch.

    Args:
        kernel: one of the two.
        ragged: whether the columns of the block are no multiple of 32.
    """
    constexprs = {"RAGGED": ragged, "PURE": False}
    kinds = {"N": "i32", "C": "i32", "B": "i32", **dict.fromkeys(constexprs, "constexpr")}
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    unknown = ("N", "C", *constexprs, *ROW_POINTERS, *(["B"] if ragged else []))
    return CompileCase(
        name=kernel.fn.__name__,
        config="other columns" if ragged else "columns in 32s",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(name for name in signature if name not in unknown),
        num_warps=OPTIONS["num_warps"],
        num_stages=OPTIONS["num_stages"],
        tensor_core=("HMMA",),
    )

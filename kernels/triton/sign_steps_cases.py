"""The kernels of the sign search as compile cases; one compiled kernel serves every number of rows and candidates."""

from typing import Any

from bwla_kernels.triton.compiling import CompileCase
from bwla_kernels.triton.sign_steps import OPTIONS
from bwla_kernels.triton.sign_steps_kernel import ROW_POINTERS, choose_signs_kernel, flip_signs_kernel


def compile_cases(arch: int) -> list[CompileCase]:
    """Return all cases; they are the same for every compute capability `arch` / 10."""
    return [case_of(choose_signs_kernel), case_of(flip_signs_kernel)]


def case_of(kernel: Any) -> CompileCase:
    """Return the case of a kernel, with the types and divisibility of a launch."""
    kinds = {"N": "i32", "C": "i32", "B": "i32", "PURE": "constexpr"}
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    unknown = ("N", "C", "PURE", *ROW_POINTERS)
    return CompileCase(
        name=kernel.fn.__name__,
        config="any block",
        kernel=kernel,
        signature=signature,
        constexprs={"PURE": False},
        divisible=tuple(name for name in signature if name not in unknown),
        num_warps=OPTIONS["num_warps"],
        num_stages=OPTIONS["num_stages"],
        tensor_core=("HMMA",),
    )

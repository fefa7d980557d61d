"""The kernels of the sign search for every number of columns that a block has, as compile cases."""

from typing import Any

from bwla_kernels.triton.compiling import CompileCase
from bwla_kernels.triton.sign_steps import MOST_COLUMNS, OPTIONS
from bwla_kernels.triton.sign_steps_kernel import ROW_POINTERS, choose_signs_kernel, flip_signs_kernel

COLUMN_STEP = 32
"""The columns of a weight, and so of its last block, are a multiple of this."""


def compile_cases(arch: int) -> list[CompileCase]:
    """Return all cases; they are the same for every compute capability `arch` / 10."""
    return [
        case_of(kernel, columns)
        for kernel in (choose_signs_kernel, flip_signs_kernel)
        for columns in range(COLUMN_STEP, MOST_COLUMNS + 1, COLUMN_STEP)
    ]


def case_of(kernel: Any, columns: int) -> CompileCase:
    """Return the case of a kernel for a block of `columns`, with the types and divisibility of a launch."""
    constexprs = {"B": columns, "PURE": False}
    kinds = {"N": "i32", "C": "i32", **dict.fromkeys(constexprs, "constexpr")}
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    return CompileCase(
        name=kernel.fn.__name__,
        config=f"{columns} columns",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(name for name in signature if name not in (*kinds, *ROW_POINTERS)),
        num_warps=OPTIONS["num_warps"],
        num_stages=OPTIONS["num_stages"],
        tensor_core=("HMMA",),
    )

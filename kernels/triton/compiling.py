"""Compile one kernel ahead of time, without a GPU, and inspect the assembled code.

Triton includes `ptxas` and the disassemblers; registers and stack come from the cubin's own ELF notes
(`.nv.info`), instructions from its disassembly.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bwla_kernels.errors import BackendError
from bwla_kernels.triton.sass import count_mnemonics, disassemble, main_loop, undefined_registers

ARCHITECTURES = (80, 89, 90, 100)
"""Compute capabilities, times ten, that every selectable kernel must compile for."""

SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
"""Shared memory bytes that one program may use; the driver checks it, the compiler does not."""

_REGCOUNT, _FRAME_SIZE = 0x2F, 0x11
"""Attributes of `.nv.info` that hold (symbol, value) pairs."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration.

    Attributes:
        name: the kernel's name.
        config: short description of the configuration.
        kernel: the `triton.jit` function (not an interpreted one).
        signature: argument -> Triton type (`*bf16`, `i32`, ...), or `constexpr`.
        constexprs: values of the compile-time arguments.
        divisible: arguments that are divisible by 16 (aligned pointers, round sizes).
        num_warps, num_stages: as at launch.
        tensor_core: prefixes of SASS mnemonics, one of which must occur; () if none is needed.
        loop_weights: weights that one iteration of the main loop consumes, to compute instructions per weight.
        loop_cores: tensor-core instructions of a warp in one iteration, by which unrolled iterations are counted; 0 if
            the assembler is not expected to unroll the main loop.
        options: further compiler options.
        fragment_layout: the tensor layout that inline tensor-core instructions rely on; "" if there are none.
        planes: binary planes of the weight.
    """

    name: str
    config: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    tensor_core: tuple[str, ...]
    loop_weights: int = 0
    loop_cores: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    fragment_layout: str = ""
    planes: int = 1


def signature_of(kernel: Any, constexprs: Mapping[str, Any], pointers: Mapping[str, str]) -> dict[str, str]:
    """Return the Triton type of every argument: those of `pointers`, `constexpr`, and i32 for the others."""
    return {
        name: "constexpr" if name in constexprs else pointers.get(name, "i32") for name in kernel.arg_names
    }


@dataclass(frozen=True)
class Compiled:
    """A case compiled for one architecture.

    Attributes:
        registers: per thread.
        spills: instructions that move registers to or from local memory (STL, LDL).
        stack: bytes of local memory per thread.
        shared_bytes: shared memory per program.
        instructions: count by mnemonic (`IMMA`, `LDG`, ...) over the whole kernel.
        loop: the same over the main loop: the innermost one with a tensor-core instruction, without what a forward
            branch may skip (the end of a rotation group, which most iterations do not reach). The whole kernel if the
            assembler has unrolled that loop completely.
        tensor_core: the expected mnemonic that occurs, "" if none does.
        per_weight: thread instructions of the main loop per weight, None if not computed.
        fragment_layouts: layouts of the tensors that inline tensor-core instructions work on.
        undefined: uniform registers that are read but never written, see `sass.undefined_registers`.
    """

    case: CompileCase
    arch: int
    registers: int
    spills: int
    stack: int
    shared_bytes: int
    instructions: Mapping[str, int]
    loop: Mapping[str, int]
    tensor_core: str
    per_weight: float | None
    fragment_layouts: frozenset[str] = frozenset()
    undefined: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """Return one sentence for each check that the kernel fails; empty if it passes."""
        where = f"{self.case.name} [{self.case.config}] on sm_{self.arch}"
        limit = SHARED_LIMIT[self.arch]
        problems = []
        if self.spills:
            problems.append(f"{where}: {self.spills} spill instructions (LDL/STL), the limit is 0")
        if self.stack:
            problems.append(f"{where}: {self.stack} bytes of stack, the limit is 0")
        if self.shared_bytes > limit:
            problems.append(f"{where}: {self.shared_bytes} bytes of shared memory, the limit is {limit}")
        if self.case.tensor_core and not self.tensor_core:
            expected = " or ".join(self.case.tensor_core)
            problems.append(f"{where}: no tensor-core instruction ({expected}) found, expected at least one")
        if self.undefined:
            problems.append(
                f"{where}: wrong code, registers are read but never written: {'; '.join(self.undefined)}"
            )
        expected_layout = self.case.fragment_layout
        if expected_layout and self.fragment_layouts != {expected_layout}:
            layouts = " and ".join(sorted(self.fragment_layouts)) or "none"
            problems.append(f"{where}: inline mma on layout {layouts}, it relies on {expected_layout}")
        return problems


def compile_case(case: CompileCase, arch: int) -> Compiled:
    """Compile a case for compute capability `arch` / 10.

    Raises:
        BackendError: the kernel is interpreted, the compiler rejects it, or there is no disassembler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(case.kernel, triton.JITFunction):
        raise BackendError(
            f"{case.name}: cannot be compiled under TRITON_INTERPRET=1: run this in a process without it"
        )
    order = list(case.kernel.arg_names)
    attrs = {(order.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    constexprs = {(order.index(name),): value for name, value in case.constexprs.items()}
    source = ASTSource(case.kernel, case.signature, constexprs, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    try:
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        raise BackendError(
            f"{case.name} [{case.config}] on sm_{arch}: does not compile: {type(error).__name__}: {error}"
        ) from error
    cubin: bytes = built.asm["cubin"]
    notes = read_notes(cubin)
    lines = disassemble(cubin)
    loop = main_loop(lines, case.tensor_core)
    total = count_mnemonics(lines)
    matched = next(
        (name for prefix in case.tensor_core for name in sorted(total) if name.startswith(prefix)), ""
    )
    per_weight = None
    if case.loop_weights:
        threads = 32 * case.num_warps
        cores = sum(count for name, count in loop.items() if name.startswith(case.tensor_core))
        rounds = cores / case.loop_cores if case.loop_cores and cores else 1.0
        per_weight = sum(loop.values()) * threads / (case.loop_weights * rounds)
    return Compiled(
        case=case,
        arch=arch,
        registers=notes.get(_REGCOUNT, 0),
        spills=total["LDL"] + total["STL"],
        stack=notes.get(_FRAME_SIZE, 0),
        shared_bytes=built.metadata.shared,
        instructions=total,
        loop=loop,
        tensor_core=matched,
        per_weight=per_weight,
        fragment_layouts=inline_mma_layouts(built.asm["ttgir"]),
        undefined=tuple(undefined_registers(lines)),
    )


def inline_mma_layouts(ttgir: str) -> frozenset[str]:
    """Return the layouts of the results of inline `mma` instructions in Triton's GPU dialect, without whitespace."""
    named = {
        name: "".join(text.split()) for name, text in re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE)
    }
    found = set()
    for line in ttgir.splitlines():
        if "tt.elementwise_inline_asm" in line and "mma.sync" in line:
            result = re.search(r"-> tensor<[^#]*(#\w+)>", line)
            found.add(named.get(result[1], result[1]) if result else "unknown")
    return frozenset(found)


def read_notes(cubin: bytes) -> dict[int, int]:
    """Return the largest value of each (symbol, value) attribute in the `.nv.info` section of an ELF cubin."""
    if cubin[:4] != b"\x7fELF":
        raise BackendError(f"expected an ELF cubin, found {cubin[:4]!r}: this Triton is not supported")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    notes: dict[int, int] = {}
    for section in sections:
        start = strings + section[0]
        if cubin[start : cubin.index(b"\0", start)] != b".nv.info":
            continue
        at, end = section[4], section[4] + section[5]
        while at + 4 <= end:
            kind, attribute, length = struct.unpack_from("<BBH", cubin, at)
            if kind == 4 and length == 8:
                _, value = struct.unpack_from("<II", cubin, at + 4)
                notes[attribute] = max(notes.get(attribute, 0), value)
            at += 4 + (length if kind == 4 else 0)
    return notes

"""Peak rates of this GPU's tensor cores: binary (and, popcount) and int8 instructions back to back."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from benchmarks.kernels.gpu.journal import Case, Row
from benchmarks.kernels.gpu.shapes import Setting
from benchmarks.kernels.gpu.timing import time_events

WARPS, ROUNDS, CHAINS = 8, 1024, 8

BINARY = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
INTEGER = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
OPERATIONS = {BINARY: 2 * 16 * 8 * 256, INTEGER: 2 * 16 * 8 * 32}
"""Operations of one instruction; a multiplication and an addition count as two."""


def assembly(instruction: str) -> str:
    """Return PTX that runs ROUNDS times CHAINS independent instructions on operands from $1; $0 is their sum."""
    lines = [f".reg .b32 acc<{4 * CHAINS}>;", ".reg .b32 left;", ".reg .pred more;"]
    lines += [f"mov.b32 acc{i}, 0;" for i in range(4 * CHAINS)]
    lines += [f"mov.b32 left, {ROUNDS};", "again:"]
    for chain in range(CHAINS):
        sums = ", ".join(f"acc{4 * chain + i}" for i in range(4))
        lines.append(f"{instruction} {{{sums}}}, {{$1, $1, $1, $1}}, {{$1, $1}}, {{{sums}}};")
    lines += ["sub.s32 left, left, 1;", "setp.ne.s32 more, left, 0;", "@more bra again;", "mov.b32 $0, 0;"]
    lines += [f"add.s32 $0, $0, acc{i};" for i in range(4 * CHAINS)]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.jit  # type: ignore[untyped-decorator]
def rate_kernel(out, seed, ASM: tl.constexpr, THREADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Run the assembly once in each warp."""
    lane = tl.arange(0, THREADS)
    total = tl.inline_asm_elementwise(
        asm=ASM,
        constraints="=&r,r",
        args=[lane * 0x01234567 + seed],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    tl.store(out + tl.program_id(0) * THREADS + lane, total)


def _measure(row: Row, instruction: str, setting: Setting) -> None:
    """Fill `tera_operations`, 10^12 operations/s of the whole GPU; all programs must compute the same sums."""
    programs = 4 * torch.cuda.get_device_properties(setting.device).multi_processor_count
    out = torch.zeros(programs, 32 * WARPS, dtype=torch.int32, device=setting.device)

    def run() -> None:
        rate_kernel[(programs,)](out, 1, assembly(instruction), 32 * WARPS, num_warps=WARPS)

    run()
    row["ok"] = bool(out.any()) and torch.equal(out, out[:1].expand_as(out))
    microseconds = time_events(run).into(row, "kernel")
    row["tera_operations"] = programs * WARPS * ROUNDS * CHAINS * OPERATIONS[instruction] / microseconds / 1e6


def cases(setting: Setting) -> Iterator[Case]:
    """Return the step's cases; there are none without a GPU."""
    for name, instruction in (("binary", BINARY), ("int8", INTEGER)):
        if setting.on_gpu:
            yield Case(name, partial(_measure, instruction=instruction, setting=setting))

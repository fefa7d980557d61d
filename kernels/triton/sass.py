"""Inspect a kernel's SASS: instruction counts, loops, and a check for miscompiled code."""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from bwla_kernels.errors import BackendError


@cache
def disassembler() -> tuple[str, ...]:
    """Return the command that disassembles a cubin: Triton's own tools first, then those on the path.

    Raises:
        BackendError: neither nvdisasm nor cuobjdump is installed.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name, arguments in (("nvdisasm", ("-c",)), ("cuobjdump", ("-sass",))):
        found = shutil.which(name, path=str(tools)) or shutil.which(name)
        if found:
            return (found, *arguments)
    raise BackendError(
        f"neither nvdisasm nor cuobjdump was found in {tools} or on the path: instructions cannot be checked; "
        "install the CUDA toolkit or a Triton wheel that includes them"
    )


def disassemble(cubin: bytes) -> list[str]:
    """Disassemble a cubin into SASS, one instruction or label per line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([*disassembler(), file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"{disassembler()[0]} failed: {done.stderr.strip()}")
    return done.stdout.splitlines()


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_\w+):")


def _instructions(lines: list[str]) -> list[tuple[int, str, str]]:
    """Return (address, mnemonic with suffixes, operands) of every instruction."""
    instructions = []
    for line in lines:
        match = _INSTRUCTION.search(line)
        if match:
            instructions.append((int(match[1], 16), match[2], match[3]))
    return instructions


def count_mnemonics(lines: list[str]) -> Counter[str]:
    """Count each mnemonic, without its suffixes and without padding."""
    counts = Counter(name.split(".")[0] for _, name, _ in _instructions(lines))
    del counts["NOP"]
    return counts


def loops(lines: list[str]) -> list[list[str]]:
    """Return the bodies of all loops (targets of backward branches) without what forward branches inside may skip.

    Each is a list of mnemonics without suffixes.
    """
    return [kept for kept, _ in _loop_bodies(lines)]


def _loop_bodies(lines: list[str]) -> list[tuple[list[str], list[str]]]:
    """Return the body of each loop twice: without what forward branches inside may skip, and whole."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    flat: list[tuple[int, str]] = []
    jumps: list[tuple[int, str]] = []
    for line in lines:
        label = _LABEL.match(line)
        match = _INSTRUCTION.search(line)
        if label:
            waiting.append(label[1])
        elif match:
            address, name = int(match[1], 16), match[2].split(".")[0]
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            flat.append((address, name))
            if name == "BRA":
                jumps.append((address, match[3]))
    branches = [(at, _target(operands, labels)) for at, operands in jumps]
    bodies = []
    for end, start in branches:
        if start is None or start >= end:
            continue
        skipped = [(at, to) for at, to in branches if to is not None and start <= at < to <= end]
        whole = [(address, name) for address, name in flat if start <= address <= end and name != "NOP"]
        kept = [name for address, name in whole if not any(at < address < to for at, to in skipped)]
        bodies.append((kept, [name for _, name in whole]))
    return bodies


def _target(operands: str, labels: Mapping[str, int]) -> int | None:
    """Return the address that a branch targets, by a label (nvdisasm) or an address (cuobjdump)."""
    for label in re.findall(r"\.L_\w+", operands):
        if label in labels:
            return labels[label]
    absolute = re.search(r"0x([0-9a-f]+)", operands)
    return int(absolute[1], 16) if absolute else None


def main_loop(lines: list[str], tensor_core: tuple[str, ...]) -> Counter[str]:
    """Count the mnemonics of the main loop: the shortest one with a tensor-core instruction.

    The instruction may be in a branch of the loop, as on Blackwell, where one thread issues it. If no loop has one,
    count the whole kernel: the loop ran a constant number of times and was unrolled. Without tensor cores, count the
    longest loop.
    """
    bodies = sorted(_loop_bodies(lines), key=lambda body: len(body[0]))
    if not tensor_core:
        return Counter(bodies[-1][0] if bodies else [])
    for part in (0, 1):  # outside branches first
        for body in bodies:
            if any(name.startswith(tensor_core) for name in body[part]):
                return Counter(body[0])
    return count_mnemonics(lines)


def _descriptors(first: int, name: str, second_operand: str) -> range:
    """Return the registers of `gdesc[UR first]`: one descriptor on sm_100, those of both operands on sm_90.

    On sm_90 those of the left operand are unused if it is in registers.
    """
    if name.startswith("UTC"):
        return range(first, first + 2)
    return range(first + 2 if re.match(r"R\d+$", second_operand) else first, first + 4)


def undefined_registers(lines: list[str]) -> list[str]:
    """Return the uniform registers that are read but never written, each with the instruction that reads it first.

    The assembler of CUDA 12.8 (ptxas 12.8.93, which Triton 3.6 includes) generates such code if the descriptors of two
    wgmma operands have the same address in shared memory but different layouts: it adds to a register that was never
    set, and the product reads unrelated memory. CUDA 12.9 and 13.0 assemble the same PTX correctly. Observed on an H100
    as wrong codes and illegal memory accesses.
    """
    written: set[int] = set()
    read: dict[int, str] = {}
    for _, name, text in _instructions(lines):
        operands = [operand.strip() for operand in text.split(",")]
        target = re.fullmatch(r"UR(\d+)", operands[0])
        if target:
            first = int(target[1])
            count = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
            written.update(range(first, first + count))
            operands = operands[1:]
        rest = " ".join(operands)
        registers = {int(register) for register in re.findall(r"\bUR(\d+)\b", rest)}
        for group in re.findall(r"gdesc\[UR(\d+)\]", rest):
            registers.discard(int(group))
            registers.update(_descriptors(int(group), name, operands[1]))
        for register in registers:
            read.setdefault(register, f"{name} {text.strip()}")
    return [f"UR{register} in {read[register]}" for register in sorted(set(read) - written)]

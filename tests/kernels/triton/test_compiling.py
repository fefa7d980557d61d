"""What is read out of a disassembly: loops, and which of them is the main one."""

from bwla_kernels.triton.compiling import count_mnemonics, loops, main_loop


def listing(*instructions: str) -> list[str]:
    """SASS as nvdisasm prints it: an instruction every 16 bytes, labels on lines of their own."""
    lines, address = [], 0
    for text in instructions:
        if text.startswith(".L"):
            lines.append(f"{text}:")
        else:
            lines.append(f"        /*{address:04x}*/                   {text} ;")
            address += 16
    return lines


PLAIN = listing(
    "S2R R0, SR_TID.X",
    ".L_x_0",
    "LDG.E R1, [R2]",
    "LDG.E R3, [R4]",
    "FADD R5, R1, R3",
    "FADD R6, R1, R3",
    "@P0 BRA `(.L_x_0)",
    ".L_x_1",
    "LDG.E R1, [R2]",
    "BMMA.168256.POPC.AND R0, R4, R8, R12",
    "@!P1 BRA `(.L_x_2)",
    "FMUL R0, R0, R9",
    ".L_x_2",
    "@P0 BRA `(.L_x_1)",
    "EXIT",
    "NOP",
)


def test_the_main_loop_is_the_one_with_the_tensor_core() -> None:
    """Without what a branch skips (here the multiplication) and without padding."""
    assert [sorted(body) for body in loops(PLAIN)] == [
        ["BRA", "FADD", "FADD", "LDG", "LDG"],
        ["BMMA", "BRA", "BRA", "LDG"],
    ]
    assert main_loop(PLAIN, ("BMMA",)) == {"LDG": 1, "BMMA": 1, "BRA": 2}
    assert main_loop(PLAIN, ()) == {"LDG": 2, "FADD": 2, "BRA": 1}, "the longest, where none is wanted"


def test_an_unrolled_main_loop_is_the_whole_kernel() -> None:
    """Loops without a tensor-core instruction (an epilogue's) are not taken for it."""
    unrolled = listing(
        *("BMMA.168256.POPC.AND R0, R4, R8, R12",) * 5,
        ".L_x_0",
        "LDG.E R1, [R2]",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
    )
    assert (
        main_loop(unrolled, ("BMMA",))
        == count_mnemonics(unrolled)
        == {"BMMA": 5, "LDG": 1, "BRA": 1, "EXIT": 1}
    )

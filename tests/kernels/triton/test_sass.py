"""What is read out of a disassembly: loops, and which of them is the main one."""

from bwla_kernels.triton.sass import count_mnemonics, loops, main_loop, undefined_registers


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


def test_a_uniform_register_that_is_read_but_never_written() -> None:
    """As ptxas 12.8 wrote it: UR33 has no value, its neighbours come from a 64-bit and a 32-bit instruction."""
    lines = [
        "/*0010*/  ULDC.64 UR34, c[0x0][0x208] ;",
        "/*0020*/  UMOV UR11, 0xc0000010 ;",
        "/*0030*/  UIADD3 UR38, UP0, UR33, 0x20, URZ ;",
        "/*0040*/  @P3 LDG.E.128 R32, desc[UR34][R46.64] ;",
        "/*0050*/  STS.128 [R47+UR35+0x8000], R20 ;",
        "/*0060*/  UIADD3.X UR39, UR34, -0x3ffffff0, URZ, UP0, !UPT ;",
        "/*0070*/  UMOV.64 UR36, URZ ;",
        "/*0080*/  HGMMA.64x16x16.F32 R88, gdesc[UR36].tnspB, R88 ;",
        "/*0090*/  HGMMA.64x16x16.F32 R88, R24, gdesc[UR36].tnspB, R88 ;",
    ]
    assert undefined_registers(lines) == ["UR33 in UIADD3 UR38, UP0, UR33, 0x20, URZ"]
    sound = ["/*0000*/  UMOV UR33, URZ ;", *lines]
    assert not undefined_registers(sound)
    left_in_registers = [
        line for line in sound if "UMOV.64" not in line and " gdesc" not in line.split(",")[1]
    ]
    assert not undefined_registers(left_in_registers)
    left_in_memory = [line for line in sound if "UMOV.64" not in line]
    assert len(undefined_registers(left_in_memory)) == 2


def test_a_descriptor_of_blackwell_is_a_pair() -> None:
    lines = [
        "/*0000*/  UMOV.64 UR60, URZ ;",
        "/*0010*/  UMOV.64 UR62, URZ ;",
        "/*0020*/  UTCHMMA gdesc[UR62], gdesc[UR60], tmem[UR60], URZ ;",
    ]
    assert not undefined_registers(lines)
    assert len(undefined_registers(lines[1:])) == 2


def test_the_main_loop_may_issue_its_product_in_a_branch() -> None:
    """As on Blackwell, where one thread does; what the branch skips is not counted."""
    lines = [
        "/*0000*/  MOV R1, R2 ;",
        ".L_x_0:",
        "/*0010*/  LDS R3, [R4] ;",
        "/*0020*/  @P0 BRA `(.L_x_1) ;",
        "/*0030*/  UTCIMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;",
        ".L_x_1:",
        "/*0040*/  @P1 BRA `(.L_x_0) ;",
        "/*0050*/  EXIT ;",
    ]
    assert main_loop(lines, ("UTCIMMA",)) == {"LDS": 1, "BRA": 2}

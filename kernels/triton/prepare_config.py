"""Choose the tiles of the input kernels, from a layer's sizes and the number of tokens; nothing is measured.

Few tokens are split among several programs each (`FewConfig`, few_kernel.py); for many tokens a program handles one
rotation group of one token, or of several tokens (`InputConfig`, prepare_kernel.py).
"""

import itertools
from dataclasses import dataclass
from functools import cache

import torch
import triton
from bwla_kernels.factorize import MAX_FACTOR
from bwla_kernels.format import LayerSpec

PLANES_MAX_TOKENS = 8
"""Largest number of tokens for which bit planes are written."""

MIN_TILE = 16
"""Smallest side of a tensor-core tile."""


EQUAL = 0
"""Width of a piece that selects `equal_pieces`."""

FEW_PROGRAMS = 6144
"""Most programs of the kernel for few tokens: about a dozen waves on a large GPU. Its time grows with them, from 5
microseconds for Qwen3-32B's down at one token; the other kernel took 78 for it at 64 tokens (5,760 programs; H200)."""

FEW_COLUMNS = 640
"""Approximate number of columns of a share of u."""

MOST_STEPS = 6
"""Most steps of such a share: they bound what a thread holds of A."""

FEW_REGISTERS = 255
"""Registers that a thread of the kernel for few tokens may use: without it the assembler may spill a few."""

FEW_PIECE = 16
"""Columns of a rotation group that a program of the kernel for few tokens rotates: the least of a tensor core."""

FILLS_GPU = 256
"""Pairs of a token and a rotation group from which throughput counts more than the time of one."""

U_TOKENS, U_STEP = 16, 128
"""Tokens and columns per step of a program that projects: small, for many programs, as each covers the width."""


@dataclass(frozen=True)
class InputConfig:
    """Tiles of the kernel for many tokens.

    Attributes:
        tokens: tokens of which one program rotates a rotation group (a power of two).
        piece, out_piece: widest piece of columns of L^T X, and of (L^T X) R; EQUAL for `equal_pieces`.
        num_warps: warps of a program.
        max_registers: registers that a thread may use; None lets the assembler trade them for occupancy.
        u_tokens, u_ranks, u_step: tokens, rows of A and columns per step of a program that projects.
    """

    tokens: int
    piece: int
    out_piece: int
    num_warps: int
    max_registers: int | None
    u_tokens: int
    u_ranks: int
    u_step: int


@dataclass(frozen=True)
class FewConfig:
    """Tiles of the kernel for few tokens.

    Attributes:
        num_warps: warps of a program.
        slices: programs that share the columns of u of a token.
        step: columns that such a program reads at a time.
    """

    num_warps: int
    slices: int
    step: int


@dataclass(frozen=True)
class _Pieces:
    """How the kernel for many tokens cuts the columns on GPUs from `capability` on, for tiles up to a size.

    Attributes:
        capability: oldest compute capability.
        rows, columns: largest padded n1 and n2.
        piece, out_piece, max_registers: as in `InputConfig`.
    """

    capability: tuple[int, int]
    rows: int
    columns: int
    piece: int
    out_piece: int
    max_registers: int | None

    def covers(self, capability: tuple[int, int], rows: int, columns: int) -> bool:
        """Return whether the entry is for a tile of `rows` x `columns` on a GPU."""
        return capability >= self.capability and rows <= self.rows and columns <= self.columns


PIECES = (
    # Operands come from shared memory. On 10.x the assembler, left alone, may spill a register or two to fit one more
    # program on a multiprocessor; so it may below 9.0.
    _Pieces((10, 0), MAX_FACTOR, MAX_FACTOR, EQUAL, EQUAL, 255),
    _Pieces((9, 0), MAX_FACTOR, MAX_FACTOR, EQUAL, EQUAL, None),
    # Operands go through registers: the widest pieces that do not spill.
    _Pieces((0, 0), MAX_FACTOR, 64, 64, 64, 255),
    _Pieces((0, 0), 64, MAX_FACTOR, 64, 32, 255),
    _Pieces((0, 0), MAX_FACTOR, MAX_FACTOR, 32, 64, 255),
)
"""The first entry that covers a tile is chosen; found with `compile_check`."""


def padded_rows(n1: int) -> int:
    """Return the rows of a token's tile: n1 padded to a size that tensor cores support."""
    return max(MIN_TILE, int(triton.next_power_of_2(n1)))


@cache
def column_pieces(n2: int, widest: int = MAX_FACTOR) -> tuple[int, ...]:
    """Split n2, padded to a multiple of 16, into powers of two of at most `widest`: 80 -> (64, 16)."""
    rest = -(-n2 // MIN_TILE) * MIN_TILE
    pieces = []
    while rest:
        pieces.append(min(widest, 1 << (rest.bit_length() - 1)))
        rest -= pieces[-1]
    return tuple(pieces)


@cache
def equal_pieces(n2: int) -> tuple[int, ...]:
    """Split n2 into pieces of one width (32, 64 or 128) that pad it least: 80 -> (32, 32, 32), 48 -> (64,)."""
    width = min((128, 64, 32), key=lambda wide: -(-n2 // wide) * wide)
    return (width,) * -(-n2 // width)


def right_columns(n2: int) -> int:
    """Return the rows and columns of a stored right rotation: n2 padded to a multiple of 16."""
    return -(-n2 // MIN_TILE) * MIN_TILE


def few_programs(spec: LayerSpec) -> int:
    """Return the number of programs that rotate one token in the kernel for few tokens."""
    return spec.rotation_groups * right_columns(spec.n2) // FEW_PIECE


def few_tokens(spec: LayerSpec) -> int:
    """Return the largest number of tokens for which the kernel for few tokens is chosen."""
    programs = few_programs(spec) + (select_few(spec).slices if spec.rank else 0)
    return max(PLANES_MAX_TOKENS, FEW_PROGRAMS // programs)


def select_config(spec: LayerSpec, m: int, capability: tuple[int, int]) -> InputConfig | FewConfig:
    """Choose the tiles for `m` tokens, from the layer's sizes alone; nothing is measured at request time.

    Args:
        spec: the layer.
        m: tokens.
        capability: compute capability of the GPU.
    """
    if m <= few_tokens(spec) or (capability < (9, 0) and _spills_many(spec)):
        return select_few(spec)
    return select_many(spec, m, capability)


def _spills_many(spec: LayerSpec) -> bool:
    """Return whether the kernel for many tokens spills below 9.0, where operands go through registers."""
    rows = padded_rows(spec.n1)
    return right_columns(spec.n2) > 96 and (rows > 64 or spec.n1 < rows)


def select_few(spec: LayerSpec) -> FewConfig:
    """Split u into shares whose part of A a thread holds in registers: at most 320 16-bit numbers up to rank 64.

    With a higher rank they may exceed the registers.
    """
    warps = 8 if padded_rows(spec.n1) > 64 else 4
    step = max(16, min(1024, 1024 * warps // triton.next_power_of_2(max(spec.rank, 1))))
    columns = min(max(FEW_COLUMNS, step) // step, MOST_STEPS) * step
    return FewConfig(warps, -(-spec.in_features // columns), step)


def select_many(spec: LayerSpec, m: int, capability: tuple[int, int]) -> InputConfig:
    """Choose the tiles where a program rotates a whole rotation group of one or several tokens."""
    rows, columns = padded_rows(spec.n1), right_columns(spec.n2)
    tokens = max(1, 64 // rows) if m * spec.rotation_groups > FILLS_GPU else 1
    warps = 8 if tokens * rows > 64 else 4
    pieces = next(entry for entry in PIECES if entry.covers(capability, rows, columns))
    ranks = max(MIN_TILE, min(triton.next_power_of_2(max(spec.rank, 1)), 64))
    return InputConfig(
        tokens, pieces.piece, pieces.out_piece, warps, pieces.max_registers, U_TOKENS, ranks, U_STEP
    )


def launch_constants(
    spec: LayerSpec,
    config: InputConfig,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype | None,
    fuse: int,
    pdl: int,
) -> dict[str, object]:
    """Return the compile-time arguments of `prepare_input_kernel`."""
    if config.piece == EQUAL:
        widths = out_widths = equal_pieces(spec.n2)
    else:
        widths = column_pieces(spec.n2, config.piece)
        out_widths = column_pieces(spec.n2, config.out_piece)
    precision = "tf32x3" if x_dtype == torch.float32 else "tf32"
    if x_dtype == a_dtype == torch.bfloat16:
        precision = "native"
    return {
        "K": spec.in_features,
        "G": spec.rotation_groups,
        "N1": spec.n1,
        "N2": spec.n2,
        "N2P": right_columns(spec.n2),
        "STARTS": tuple(itertools.accumulate(widths[:-1], initial=0)),
        "WIDTHS": widths,
        "OUT_STARTS": tuple(itertools.accumulate(out_widths[:-1], initial=0)),
        "OUT_WIDTHS": out_widths,
        "TOKENS": config.tokens,
        "ROWS": config.tokens * padded_rows(spec.n1),
        "BITS": spec.bits,
        "RANK": spec.rank,
        "FUSE": fuse,
        "SPLIT_X": x_dtype == torch.float32,
        "U_TOKENS": config.u_tokens,
        "U_RANKS": config.u_ranks,
        "U_STEP": config.u_step,
        "U_DOT": precision,
        "PDL": pdl,
    }


def few_constants(
    spec: LayerSpec, config: FewConfig, x_dtype: torch.dtype, fuse: int, chunk: int, pdl: int
) -> dict[str, object]:
    """Return the compile-time arguments of `prepare_few_kernel`; chunk 0 for no planes."""
    right = right_columns(spec.n2)
    widths = column_pieces(spec.n2)
    return {
        "K": spec.in_features,
        "G": spec.rotation_groups,
        "N1": spec.n1,
        "N2": spec.n2,
        "N2P": right,
        "ROWS": padded_rows(spec.n1),
        "STARTS": tuple(itertools.accumulate(widths[:-1], initial=0)),
        "WIDTHS": widths,
        "PIECE": FEW_PIECE,
        "BITS": spec.bits,
        "RANK": spec.rank,
        "RANKS": triton.next_power_of_2(max(spec.rank, 1)),
        "SLICES": config.slices,
        "STEP": config.step,
        "STEPS": -(-spec.in_features // (config.step * config.slices)),
        "FUSE": fuse,
        "SPLIT_X": x_dtype == torch.float32,
        "CHUNK": chunk or 256,
        "PLANES": chunk > 0,
        "PDL": pdl,
    }

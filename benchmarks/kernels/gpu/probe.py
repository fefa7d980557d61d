"""Describe the machine: versions, GPU, copy bandwidth, bf16 rate, and whether the compile cache fits the sources."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.kernels.gpu.cache import SOURCES_FILE, sources_digest
from benchmarks.kernels.gpu.journal import Case, Row
from benchmarks.kernels.gpu.shapes import Setting
from benchmarks.kernels.gpu.timing import copy_tb_s, time_calls

PACKAGES = (
    "triton",
    "numpy",
    "transformers",
    "pydantic",
    "compressed-tensors",
    "safetensors",
    "vllm",
    "bwla",
)
SQUARE = 8192


def cases(setting: Setting) -> Iterator[Case]:
    """Return the step's cases."""
    yield Case("versions", _versions)
    yield Case("cache", _cache)
    if setting.on_gpu:
        yield Case("gpu", lambda row: _gpu(row, setting))
    yield Case("copy", lambda row: _copy(row, setting))
    yield Case("bf16", lambda row: _bf16(row, setting))


def _versions(row: Row) -> None:
    row |= {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            row[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            row[name] = None
    row |= {"cores": os.cpu_count(), "commit": _commit()}


def _commit() -> str:
    """Return the commit of the sources, "" without git."""
    words = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _cache(row: Row) -> None:
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    row |= {"folder": str(folder), "entries": len(list(folder.glob("*"))) if folder.exists() else 0}
    row["sources"] = sources_digest()
    made_for = folder / SOURCES_FILE
    if made_for.exists():
        row["built_ahead"] = json.loads(made_for.read_text(encoding="utf-8"))
        row["ok"] = row["built_ahead"].get("sources") == row["sources"]


def _gpu(row: Row, setting: Setting) -> None:
    found = torch.cuda.get_device_properties(setting.device)
    for name in ("name", "multi_processor_count", "L2_cache_size", "total_memory", "major", "minor"):
        row[name] = getattr(found, name)
    words = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
    row["nvidia_smi"] = subprocess.run(words, capture_output=True, text=True, check=False).stdout


def _copy(row: Row, setting: Setting) -> None:
    row["copy_tb_s"] = copy_tb_s(setting.device)


def _bf16(row: Row, setting: Setting) -> None:
    """Measure the rate of a large bf16 product whose sums are known."""
    size = SQUARE if setting.on_gpu else 64
    a = torch.randn(size, size, device=setting.device).to(setting.dtype)
    ones = torch.ones(size, size, device=setting.device, dtype=setting.dtype)
    wanted = a.double().sum(1, keepdim=True).expand(size, size)
    row["error"] = ((a @ ones).double() - wanted).abs().max().item() / wanted.abs().max().item()
    row["ok"] = row.pop("error") < 0.01
    timing = time_calls([lambda: a @ a] * 2, setting.device)
    row["bf16_tflops"] = 2 * size**3 / timing.into(row, "product") / 1e6

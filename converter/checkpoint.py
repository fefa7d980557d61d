"""The BWLA checkpoint being written: a temporary folder beside the output, renamed into place at the end."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bwla_kernels.errors import BWLAError
from bwla_kernels.format.folder import INDEX_FILE
from safetensors.torch import load_file, save_file
from torch import Tensor

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)
"""Files of the source that go along as they are; weights, code and caches do not."""


class OutputError(BWLAError):
    """The output folder cannot be written."""


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointWriter:
    """Writes shards, then the index and config, into `folder`. Use through `atomic_output`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._weight_map: dict[str, str] = {}
        self._total_size = 0

    def write_shard(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one safetensors file and enter its tensors into the index."""
        owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(owned, self.folder / file, metadata={"format": "pt"})
        sync(self.folder / file)
        self._weight_map.update(dict.fromkeys(owned, file))
        self._total_size += sum(tensor.numel() * tensor.element_size() for tensor in owned.values())

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Put other values in the place of tensors already written, of the same shapes and dtypes."""
        files: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            files.setdefault(self._weight_map[name], {})[name] = tensor
        for file, changed in files.items():
            whole = load_file(self.folder / file)
            self._total_size -= sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
            self.write_shard(file, {**whole, **changed})

    @property
    def total_size(self) -> int:
        """Bytes of all tensors written so far."""
        return self._total_size

    def finish(self, source: Path, config: Mapping[str, Any]) -> None:
        """Copy the source's tokenizer and generation files; write the index and, last, config.json."""
        for pattern in COPIED:
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    shutil.copyfile(path, self.folder / path.name)
        index = {
            "metadata": {"total_size": self._total_size},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        self._write_json(INDEX_FILE, index)
        self._write_json("config.json", config)
        sync(self.folder)

    def _write_json(self, file: str, data: Mapping[str, Any]) -> None:
        (self.folder / file).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        sync(self.folder / file)


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output that would harm something, before any work.

    Raises:
        OutputError: `out` exists and `overwrite` is off, is not a folder, or its parent cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: expected a folder to create, found a file: choose another output")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already: choose another output or add --overwrite")
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise OutputError(f"{out}: holds no model, so --overwrite will not replace it: choose another output")
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{parent}: expected a folder that can be written to, to hold {out.name}")


@contextmanager
def atomic_output(out: Path, overwrite: bool) -> Iterator[CheckpointWriter]:
    """Give a writer into a temporary folder beside `out`; rename it to `out` when the body succeeds.

    On any failure the temporary folder is removed, and what stood at `out` before is as it was.

    Raises:
        OutputError: as `check_output`.
    """
    check_output(out, overwrite)
    out = out.absolute()
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        work.chmod(0o755)
        yield CheckpointWriter(work)
        _replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _replace(work: Path, out: Path) -> None:
    """Put `work` in the place of `out`; a folder that stands there is removed only after the new one stands."""
    old = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        out.rename(old / out.name)
    try:
        work.rename(out)
    except OSError:
        if old is not None:
            (old / out.name).rename(out)
        raise
    sync(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)

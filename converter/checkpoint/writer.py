"""Writing of checkpoints: into a temporary folder beside the output, which is renamed at the end."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bwla_converter.common.atomic_files import move, sha256_of, whole_file
from bwla_converter.common.tensors import entry_bytes
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.folder import INDEX_FILE, read_headers
from safetensors.torch import load_file, save_file
from torch import Tensor

READABLE = 0o644

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
"""Files of the source that are copied; weights, code and caches are not."""


class OutputError(BWLAError):
    """The output folder cannot be written."""


class CheckpointWriter:
    """Writes shards, then index and config, into `folder`. Each file is written atomically.

    Attributes:
        folder: the folder of the checkpoint.
        digests: SHA-256 of every shard, by file name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        self._weight_map: dict[str, str] = {}
        self._sizes: dict[str, int] = {}

    def write_shard(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one safetensors file and add its tensors to the index."""
        owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with whole_file(self.folder / file) as partial:
            save_file(owned, partial, metadata={"format": "pt"})
            partial.chmod(
                READABLE
            )  # safetensors makes files private to their owner, but a server may run as another user
        self._enter(file, {name: tensor.nbytes for name, tensor in owned.items()})
        self.digests[file] = sha256_of(self.folder / file)

    def adopt_shard(self, file: str, digest: str) -> None:
        """Add the tensors of a shard from an earlier session, with SHA-256 `digest`, to the index."""
        entries = read_headers(self.folder / file)
        self._enter(file, {name: entry_bytes(entry) for name, entry in entries.items()})
        self.digests[file] = digest

    def changed_shards(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield every shard that holds one of `tensors`, with all of its tensors after the replacement.

        Replacements must have the shape and dtype of the tensors they replace.
        """
        files: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            files.setdefault(self._weight_map[name], {})[name] = tensor
        for file, changed in files.items():
            yield file, {**load_file(self.folder / file), **changed}

    @property
    def total_size(self) -> int:
        """Bytes of all tensors in the index."""
        return sum(self._sizes.values())

    def finish(self, source: Path, config: Mapping[str, Any]) -> None:
        """Copy tokenizer and generation files from the folder `source`; write the index and, last, config.json."""
        for pattern in COPIED:
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    with whole_file(self.folder / path.name) as partial:
                        shutil.copyfile(path, partial)
        index = {
            "metadata": {"total_size": self.total_size},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        self.write_json(INDEX_FILE, index, indent=2)
        self.write_json("config.json", config, indent=2)

    def write_json(self, file: str, data: Mapping[str, Any], indent: int = 1) -> None:
        """Write a JSON file into the checkpoint."""
        with whole_file(self.folder / file) as partial:
            partial.write_text(json.dumps(data, indent=indent) + "\n", encoding="utf-8")

    def _enter(self, file: str, sizes: Mapping[str, int]) -> None:
        self._weight_map.update(dict.fromkeys(sizes, file))
        self._sizes.update(sizes)


def check_output(out: Path, overwrite: bool) -> None:
    """Raise if writing to `out` would destroy existing data. Call before converting.

    Raises:
        OutputError: `out` exists and `overwrite` is off, or it is not a folder with a model, or its parent folder is
            not writable.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: expected a folder to create, found a file: choose another output")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: already exists: choose another output or add --overwrite")
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise OutputError(f"{out}: expected a model to overwrite, found other files: choose another output")
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(
            f"{parent}: expected a writable folder for {out.name}, found none: create it or choose another output"
        )


@contextmanager
def atomic_output(out: Path, overwrite: bool) -> Iterator[CheckpointWriter]:
    """Yield a writer into a temporary folder beside `out`, which is renamed to `out` if the body succeeds.

    On any failure the temporary folder is removed and `out` is unchanged.

    Raises:
        OutputError: as `check_output`.
    """
    check_output(out, overwrite)
    out = out.absolute()
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    new, aside = work / "new", work / "old"
    try:
        new.mkdir()
        yield CheckpointWriter(new)
        put_in_place(new, out, aside)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(new: Path, out: Path, aside: Path) -> None:
    """Rename the folder `new` to `out`; an existing `out` is first renamed to `aside`, and restored on failure.

    After a kill in between, `out` is missing but `new` and `aside` are complete, so calling this again completes it.
    """
    if out.exists():
        move(out, aside)
    try:
        move(new, out)
    except OSError:
        if aside.exists():
            move(aside, out)
        raise

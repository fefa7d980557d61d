"""Find the model to convert: a folder, a GGUF file or a model on the Hub."""

import re
from pathlib import Path

from bwla_converter.source.folder.download import download
from bwla_converter.source.folder.kinds import adapter_base, other_kind, read_listing
from bwla_converter.source.gguf_path import OnProgress, ignore_progress, is_gguf
from bwla_kernels.errors import SourceError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(model: str, on_progress: OnProgress = ignore_progress) -> tuple[Path, str]:
    """Find a model folder, prepare one from a GGUF file, or download a model from the Hub by its id.

    Args:
        model: a folder, a GGUF file, or a Hub id, of which the safetensors and what belongs to them are downloaded.
        on_progress: called while a GGUF file is written as a folder, see `gguf_folder.prepare`.

    Returns: the folder, and the commit for a Hub id or an empty string for anything else.

    Raises:
        SourceError: `model` is none of the three, it holds no model in safetensors, the GGUF file cannot be used, or
            the download failed.
    """
    path = Path(model).expanduser()
    if is_gguf(path):
        from bwla_converter.source.gguf_folder import prepare  # imports gguf, which few models need

        return prepare(path, on_progress), ""
    if path.is_dir():
        problem = other_kind(read_listing(path), str(path), adapter_base(path))
        if problem is not None:
            raise SourceError(problem)
        return path, ""
    if path.is_file():
        raise SourceError(
            f"{model}: expected a folder or a GGUF file, found another file: give {path.parent}"
        )
    if path.exists() or not HUB_ID.fullmatch(model):
        raise SourceError(
            f"{model}: expected a folder, a GGUF file or a Hub id like Qwen/Qwen3-8B, found neither: check the path"
        )
    snapshot = download(model)
    return snapshot, snapshot.name

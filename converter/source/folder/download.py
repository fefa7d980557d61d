"""Download of a model from the Hub: its safetensors weights and what belongs to them, and nothing else."""

from collections.abc import Callable, Mapping
from pathlib import Path

from bwla_converter.common.write_errors import DISK_FULL
from bwla_converter.source.folder.files import select_files
from bwla_converter.source.folder.kinds import other_kind
from bwla_kernels.errors import FormatError, SourceError
from bwla_kernels.format.files import INDEX_FILE, SINGLE_FILE, read_json
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

DESCRIPTIONS = ("config.json", "README.md", INDEX_FILE)
"""Files that are read, although a conversion writes its own."""


def needed_files(sizes: Mapping[str, int], weight_map: Callable[[], Mapping[str, str]]) -> list[str]:
    """Return the files of a repository that a conversion needs.

    Not among them are weights in other formats and precisions beside the safetensors.

    Args:
        sizes: size in bytes of every file, by its path.
        weight_map: returns the index's table of tensors and their files; called if the repository has an index.

    Raises:
        SourceError: it is not clear which file holds the weights.
    """
    if SINGLE_FILE in sizes and INDEX_FILE in sizes:
        files = set(weight_map().values())
        if SINGLE_FILE not in files:
            raise SourceError(
                f"expected {SINGLE_FILE} or {INDEX_FILE}, found both, and the index does not list the file: "
                "download one of them and give its folder"
            )
    elif INDEX_FILE in sizes:
        files = set(weight_map().values())
    else:
        files = {SINGLE_FILE}
    described = {name for name in DESCRIPTIONS if name in sizes}
    return sorted({*select_files(sizes).kept, *described, *(files & sizes.keys())})


def download(model: str) -> Path:
    """Download what is needed of a model on the Hub; return the folder of the snapshot, whose name is the commit.

    Without a connection, a snapshot that is in the cache is used.

    Raises:
        SourceError: the Hub has no such model, cannot be reached, or has no safetensors of it; or the disk is full.
    """
    try:
        info = HfApi().model_info(model, files_metadata=True)
    except Exception as cause:  # of several libraries
        return _cached(model, cause)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if "config.json" not in sizes and any(file.endswith(".gguf") for file in sizes):
        raise SourceError(
            f"{model}: expected a config.json in this repository, found GGUF files: download one of them "
            f"(hf download {model} FILE.gguf --local-dir .) and give its path"
        )
    problem = other_kind(sizes, model)
    if problem is not None:
        raise SourceError(problem)

    def weight_map() -> Mapping[str, str]:
        path = Path(hf_hub_download(model, INDEX_FILE, revision=info.sha))
        table = read_json(path).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
            raise FormatError(
                f"{path}: expected a weight_map of tensor to file, found none: get the index again"
            )
        return table

    try:
        files = needed_files(sizes, weight_map)
        patterns = [_pattern(file) for file in files]
        return Path(snapshot_download(model, revision=info.sha, allow_patterns=patterns))
    except SourceError as cause:
        raise SourceError(f"{model}: {cause}") from None
    except FormatError as cause:
        raise SourceError(str(cause)) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as cause:
        raise _failed(model, cause) from None


def _cached(model: str, cause: Exception) -> Path:
    """Return the snapshot of a model in the cache; if there is none, raise about why the Hub was not reached."""
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        raise _failed(model, cause) from None


def _pattern(file: str) -> str:
    """Return a pattern of the `fnmatch` module that only `file` matches."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in file)


def _failed(model: str, cause: Exception) -> SourceError:
    if isinstance(cause, OSError) and cause.errno in DISK_FULL:
        return SourceError(
            f"{HF_HUB_CACHE}: expected enough disk space to download {model}, found: {cause.strerror}: free some disk "
            "space, or name another folder in HF_HUB_CACHE"
        )
    reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    return SourceError(
        f"{model}: found no such folder, and the download from the Hub failed ({reason}): "
        "check the name and the network connection, or give a local folder"
    )
